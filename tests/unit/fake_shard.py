"""A shard without a model: executes StepPlans in memory, and checks all a plan may get wrong.

Each KV slot holds a hash of all tokens up to its position, so that every position a row
attends to can be compared with what it must hold there. The next token is a hash of the tokens
before it, the seed and the position: a wrong history gives a wrong answer. No torch, no I/O.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b

from headgate.proto.messages import (
    Fork,
    NewRow,
    PooledStates,
    Pooling,
    PromptLogprobs,
    RowEnd,
    RowSampling,
    StepPlan,
    StepResult,
    TopTokens,
)
from headgate.router.beam_search import BeamParams, BeamSearch, Hypothesis


class PlanError(AssertionError):
    """A plan that a real shard would choke on, or answer wrongly."""


def _chain(parent: int, token: int) -> int:
    data = parent.to_bytes(8, "little") + token.to_bytes(4, "little")
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


def _root(adapter_id: str) -> int:
    return int.from_bytes(blake2b(adapter_id.encode(), digest_size=8).digest(), "little")


def _sample(history: int, sampling: RowSampling, position: int, vocabulary: int) -> int:
    data = f"{history} {sampling.seed} {sampling.sample_index} {position}".encode()
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little") % vocabulary


def _prompt_logprob(history: int) -> float:
    return -(history % 1000) / 64.0  # exact in float32


def _end(sampling: RowSampling, token: int, count: int, eos_id: int) -> RowEnd:
    """`count`: output tokens, this one included."""
    if count >= sampling.min_new_tokens:
        if token == eos_id and not sampling.ignore_eos:
            return RowEnd.EOS
        if token in sampling.stop_token_ids:
            return RowEnd.STOP_TOKEN
    return RowEnd.LENGTH if count >= sampling.max_new_tokens else RowEnd.NONE


def expected_answer(
    prompt_ids: Sequence[int],
    sampling: RowSampling,
    *,
    vocabulary: int,
    eos_id: int,
    adapter_id: str = "",
) -> tuple[list[int], RowEnd]:
    """What a request gets that is alone in the world."""
    history = _root(adapter_id)
    for token in prompt_ids:
        history = _chain(history, token)
    answer: list[int] = []
    while True:
        token = _sample(history, sampling, len(answer), vocabulary)
        answer.append(token)
        end = _end(sampling, token, len(answer), eos_id)
        if end:
            return answer, end
        history = _chain(history, token)


def expected_prompt_logprobs(prompt_ids: Sequence[int], adapter_id: str = "") -> list[float]:
    """Of prompt tokens 1, 2, ..."""
    histories = [_root(adapter_id)]
    for token in prompt_ids:
        histories.append(_chain(histories[-1], token))
    return [_prompt_logprob(history) for history in histories[2:]]


def expected_pooled(
    prompt_ids: Sequence[int], pooling: Pooling, adapter_id: str = ""
) -> list[float]:
    """The mean over all positions, or the last one's state."""
    states = [_root(adapter_id)]
    for token in prompt_ids:
        states.append(_chain(states[-1], token))
    if pooling is Pooling.LAST:
        return _hidden(states[-1])
    columns = zip(*map(_hidden, states[1:]), strict=True)
    return [sum(column) / len(prompt_ids) for column in columns]


def _hidden(history: int) -> list[float]:
    """A hidden state; sums of such numbers are exact."""
    return [float(history % 1000), float(history // 1000 % 1000)]


def best_tokens(history: int, vocabulary: int, count: int) -> TopTokens:
    """The best `count` tokens after a history."""
    if not count:
        return TopTokens((), ())
    entries = []
    for token in range(vocabulary):
        data = f"{history} {token}".encode()
        value = int.from_bytes(blake2b(data, digest_size=2).digest(), "little")
        entries.append((value / 4096, token))  # exact in float32
    entries = sorted(entries)[:count]
    return TopTokens([token for _, token in entries], [-value for value, _ in entries])


def expected_beams(
    prompt_ids: Sequence[int], params: BeamParams, *, vocabulary: int, adapter_id: str = ""
) -> list[Hypothesis]:
    """What a beam search finds that is alone in the world."""
    history = _root(adapter_id)
    for token in prompt_ids:
        history = _chain(history, token)
    search, histories = BeamSearch(params), [history]
    while not search.done:
        tops = [best_tokens(each, vocabulary, params.num_candidates) for each in histories]
        continuations = search.advance(tops)
        histories = [_chain(histories[c.parent], c.token_id) for c in continuations]
    return search.finished


@dataclass(slots=True)
class _Row:
    prompt_length: int
    sampling: RowSampling
    tokens: list[int]
    histories: list[int]  # [p]: what the KV slot of position p must hold
    root: int
    blocks: list[int]
    computed: int  # positions
    lockstep: bool
    dead: bool = False

    def append(self, token: int) -> None:
        self.histories.append(_chain(self.histories[-1] if self.histories else self.root, token))
        self.tokens.append(token)

    def choose(self, token: int) -> None:
        _require(len(self.tokens) > self.prompt_length, "a choice for a row without output")
        _require(self.computed == len(self.tokens) - 1, "a choice comes too late")
        _require(self.lockstep, "a choice for a row that goes on by itself")
        del self.tokens[-1], self.histories[-1]
        self.append(token)

    def fork(self, fork: Fork) -> _Row:
        known = fork.num_tokens + len(fork.token_ids)
        _require(fork.num_tokens <= len(self.tokens), "a fork shares tokens there are none of")
        _require(self.prompt_length <= known, "a fork lacks a part of the prompt")
        _require(known - 1 <= min(self.computed, fork.num_tokens), "a fork lacks KV")
        child = _Row(
            self.prompt_length,
            replace(self.sampling, sample_index=fork.sample_index),
            self.tokens[: fork.num_tokens],
            self.histories[: fork.num_tokens],
            self.root,
            list(fork.block_ids),
            known - 1,
            self.lockstep,
        )
        for token in fork.token_ids:
            child.append(token)
        return child


@dataclass(slots=True)
class FakeShard:
    """One Steps stream. Execute plans in the order they were made."""

    num_blocks: int
    block_size: int
    vocabulary: int = 50
    eos_id: int = 0
    max_tokens: int = 0  # of a step; 0: any
    max_rows: int = 0  # held at once; 0: any
    epoch: int = 1
    sequence: int = 0  # of the last plan
    refuse: bool = False  # set it to refuse the next plan, and all until one with `reset`
    refuse_above: int = 0  # refuse plans of more tokens than this; 0: none
    right_guesses: int = 0  # that were made
    steps: int = 0
    tokens_computed: int = 0
    _kv: dict[int, int] = field(default_factory=dict)  # by slot
    _rows: dict[int, _Row] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        return len(self._rows)

    def execute(self, plan: StepPlan) -> StepResult:
        """Raises PlanError."""
        _require(plan.epoch == self.epoch, f"epoch {plan.epoch}, not {self.epoch}")
        _require(plan.sequence == self.sequence + 1, f"{plan.sequence} after {self.sequence}")
        self.sequence = plan.sequence
        if plan.reset:
            self.refuse = False
        if self.refuse or (self.refuse_above and plan.num_tokens > self.refuse_above):
            self.refuse = True
            return StepResult(plan.epoch, plan.sequence, refused="out of memory")
        self._apply(plan)
        self._check(plan)
        return self._compute(plan)

    # ------------------------------------------------------------ applying

    def _apply(self, plan: StepPlan) -> None:
        if plan.reset:
            self._rows.clear()
        for row_id in plan.removed:
            self._rows.pop(row_id, None)
        for new in plan.new_rows:
            self._add(new)
        for fork in plan.forks:
            _require(fork.child not in self._rows, f"row {fork.child} is here already")
            self._rows[fork.child] = self._row(fork.parent).fork(fork)
        for row_id, token in plan.choices:
            self._row(row_id).choose(token)
        for source, target in plan.copies:
            for offset in range(self.block_size):
                slot = source * self.block_size + offset
                if slot in self._kv:
                    self._kv[target * self.block_size + offset] = self._kv[slot]
        for row_id, block in zip(plan.block_rows, plan.block_ids, strict=True):
            self._row(row_id).blocks.append(block)

    def _add(self, new: NewRow) -> None:
        _require(new.id not in self._rows, f"row {new.id} is here already")
        _require(len(new.output_ids) < new.sampling.max_new_tokens, f"row {new.id} is complete")
        known = len(new.prompt_ids) + len(new.output_ids)
        _require(new.num_computed_tokens < known, f"row {new.id} has nothing to compute")
        row = _Row(
            len(new.prompt_ids),
            new.sampling,
            [],
            [],
            _root(new.adapter_id),
            list(new.block_ids),
            new.num_computed_tokens,
            new.lockstep,
        )
        for token in (*new.prompt_ids, *new.output_ids):
            row.append(token)
        self._rows[new.id] = row

    def _row(self, row_id: int) -> _Row:
        _require(row_id in self._rows, f"row {row_id} is unknown")
        return self._rows[row_id]

    def _check(self, plan: StepPlan) -> None:
        _require(len(plan.rows) == len(plan.counts) > 0, "an empty plan")
        _require(len(set(plan.rows)) == len(plan.rows), "a row is planned twice")
        _require(min(plan.counts) > 0, "a row is planned for nothing")
        _require(not self.max_tokens or plan.num_tokens <= self.max_tokens, "too many tokens")
        _require(not self.max_rows or len(self._rows) <= self.max_rows, "too many rows")
        alive = {row_id: row for row_id, row in self._rows.items() if not row.dead}
        come = {new.id for new in plan.new_rows} | {fork.child for fork in plan.forks}
        readers = Counter(
            block for row_id, row in alive.items() if row_id not in come for block in row.blocks
        )
        written: set[int] = set()
        for row in alive.values():
            _require(len(set(row.blocks)) == len(row.blocks), "a block is twice in one table")
            _require(all(0 <= block < self.num_blocks for block in row.blocks), "no such block")
        drafts = plan.drafts or [0] * len(plan.rows)
        for row_id, count, most in zip(plan.rows, plan.counts, drafts, strict=True):
            row = self._row(row_id)
            if row.dead:
                continue
            stop = row.computed + count
            _require(stop <= len(row.tokens), f"row {row_id} lacks tokens for {count} more")
            if most:
                _require(stop == len(row.tokens), f"row {row_id} has tokens that are known yet")
                _require(not row.lockstep, f"row {row_id} may not go on by guesses")
                stop = min(stop + most, row.prompt_length + row.sampling.max_new_tokens - 1)
            _require(stop <= len(row.blocks) * self.block_size, f"row {row_id} lacks blocks")
            for index in range(row.computed // self.block_size, -(-stop // self.block_size)):
                block = row.blocks[index]
                others = readers[block] - (row_id not in come)
                _require(not others, f"row {row_id} writes a block that others have read")
                _require(block not in written, f"row {row_id} writes where another writes")
                written.add(block)

    # ------------------------------------------------------------ computing

    def _compute(self, plan: StepPlan) -> StepResult:
        rows: list[int] = []
        tokens: list[int] = []
        ends: list[RowEnd] = []
        top: list[TopTokens] = []
        prompt_logprobs: list[PromptLogprobs] = []
        pooled: list[PooledStates] = []
        # All writes, then all reads: as one batch would.
        drafts = plan.drafts or [0] * len(plan.rows)
        batch = [
            (row_id, self._rows[row_id], count, most)
            for row_id, count, most in zip(plan.rows, plan.counts, drafts, strict=True)
            if not self._rows[row_id].dead
        ]
        left = plan.most_drafts
        for place, (row_id, row, count, most) in enumerate(batch):
            batch[place] = row_id, row, count, min(most, left)
            left -= min(most, left)
        for _, row, count, most in batch:
            for position in range(row.computed, row.computed + count):
                self._kv[self._slot(row, position)] = row.histories[position]
            for position in range(row.computed + count, row.computed + count + most):
                if position < row.prompt_length + row.sampling.max_new_tokens - 1:
                    self._kv[self._slot(row, position)] = -1  # of a guess: wrong until it is right
        for row_id, row, count, most in batch:
            start, row.computed = row.computed, row.computed + count
            self.tokens_computed += count
            for position in range(row.computed):
                found = self._kv.get(self._slot(row, position))
                _require(
                    found == row.histories[position],
                    f"row {row_id} attends to foreign KV at position {position}",
                )
            if row.sampling.prompt_logprobs and start < row.prompt_length - 1:
                prompt_logprobs.append(self._describe(row_id, row, start))
            complete = row.computed == len(row.tokens)
            if row.sampling.pooling is Pooling.MEAN or (row.sampling.pooling and complete):
                pooled.append(self._pool(row_id, row, start))
            if complete and row.sampling.pooling:
                rows.append(row_id)
                tokens.append(0)
                top.append(TopTokens((), ()))
                ends.append(RowEnd.POOLED)
                row.dead = True
            elif complete:
                rows.append(row_id)
                count = row.sampling.top_n_tokens if row.lockstep else 0
                top.append(best_tokens(row.histories[-1], self.vocabulary, count))
                tokens.append(self._next(row))
                ends.append(self._end(row))
                for _ in range(self._right_guesses(row, most)):
                    if row.dead:
                        break
                    self._kv[self._slot(row, row.computed)] = row.histories[row.computed]
                    row.computed += 1
                    rows.append(row_id)
                    top.append(TopTokens((), ()))
                    tokens.append(self._next(row))
                    ends.append(self._end(row))
                    self.right_guesses += 1
        self.steps += 1
        return StepResult(
            plan.epoch,
            plan.sequence,
            rows=rows,
            token_ids=tokens,
            logprobs=[-token / 4 for token in tokens],
            ends=ends,
            top=[
                entry if entry.ids else TopTokens((token,), (-token / 4,))
                for entry, token in zip(top, tokens, strict=True)
            ],
            prompt_logprobs=prompt_logprobs,
            pooled=pooled,
            num_drafts=sum(most for *_, most in batch),
        )

    def _pool(self, row_id: int, row: _Row, start: int) -> PooledStates:
        if row.sampling.pooling is Pooling.LAST:
            start = row.computed - 1
        states = [_hidden(history) for history in row.histories[start : row.computed]]
        sums = [sum(column) for column in zip(*states, strict=True)]
        return PooledStates(row_id, start, row.computed, sums)

    def _end(self, row: _Row) -> RowEnd:
        count = len(row.tokens) - row.prompt_length
        end = _end(row.sampling, row.tokens[-1], count, self.eos_id)
        row.dead = end is not RowEnd.NONE
        return end

    def _right_guesses(self, row: _Row, most: int) -> int:
        """How many of its next tokens are guessed: any number up to `most`."""
        return _sample(row.histories[-1], row.sampling, self.sequence, most + 1)

    def _next(self, row: _Row) -> int:
        position = len(row.tokens) - row.prompt_length
        token = _sample(row.histories[-1], row.sampling, position, self.vocabulary)
        row.append(token)
        return token

    def _describe(self, row_id: int, row: _Row, start: int) -> PromptLogprobs:
        """Position p tells of the prompt token at p + 1."""
        stop = min(row.computed + 1, row.prompt_length)
        histories = row.histories[start + 1 : stop]
        return PromptLogprobs(row_id, start + 1, [_prompt_logprob(each) for each in histories])

    def _slot(self, row: _Row, position: int) -> int:
        block, offset = divmod(position, self.block_size)
        return row.blocks[block] * self.block_size + offset


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise PlanError(message)
