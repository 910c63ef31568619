"""NullRunner: answers plans at once, without a model. A benchmark of what is around the shards.

A row's answer is its prompt, over and over, so that the text is real text and the same for the
same request. Ends of sequence never come; stop tokens and lengths end a row as always. Sampling
parameters change nothing, logprobs are 0, there are no prompt logprobs and no alternatives but for
beams, which are offered the first tokens of the vocabulary; a pooled prompt is the number 1.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from headgate.proto.messages import (
    NewRow,
    PooledStates,
    Pooling,
    RowEnd,
    StepPlan,
    StepResult,
    TopTokens,
)
from headgate.shard.config import ShardConfig, ShardIdentity
from headgate.shard.input_batch import PlanError
from headgate.shard.model_config import ModelConfig
from headgate.shard.pending_step import PendingStep
from headgate.shard.runner import Heartbeat, RunnerFacts

_NO_TOP = TopTokens((), ())
_NO_END = RowEnd.NONE  # read for each token, and an Enum's attribute takes ten times as long


@dataclass(slots=True)
class _Row:
    script: Sequence[int]  # its prompt, without ends of sequence
    stop_token_ids: frozenset[int]
    left: int  # tokens it may still get
    given: int  # tokens it got
    uncomputed: int  # known tokens that no plan has computed
    num_prompt: int
    pooled: bool
    candidates: TopTokens  # what a beam may go on with
    ended: bool = False

    def fork(self, num_tokens: int) -> _Row:
        """A row of so many tokens that begins like this one, all computed but the last."""
        given = num_tokens - self.num_prompt
        left = self.left + self.given - given
        return replace(self, given=given, left=left, uncomputed=1, ended=False)

    def next_token(self) -> tuple[int, RowEnd]:
        token = self.script[self.given % len(self.script)]
        self.given += 1
        self.left -= 1
        self.uncomputed = 1
        end = _NO_END
        if token in self.stop_token_ids:
            end = RowEnd.STOP_TOKEN
        elif self.left <= 0:
            end = RowEnd.LENGTH
        self.ended = end is not _NO_END
        return token, end


class NullRunner:
    """One rank that holds rows and no tensors."""

    def __init__(self, model: ModelConfig, config: ShardConfig, identity: ShardIdentity) -> None:
        self.config = config
        self.identity = identity
        self.heartbeat = Heartbeat()
        self.facts = RunnerFacts(
            model_type=model.model_type,
            vocab_size=model.vocab_size,
            max_position_embeddings=model.max_position_embeddings,
            eos_token_ids=model.eos_token_ids,
            weight_bytes=0,
            kv_bytes_per_block=0,
        )
        self._eos = frozenset(model.eos_token_ids)
        self._rows: dict[int, _Row] = {}

    def warm_up(self, max_tokens: int, max_rows: int) -> int:
        """The configured number of blocks: nothing is to be found out."""
        return self.config.num_blocks

    def allocate(self, num_blocks: int) -> None:
        self.reset()

    def prepare_grammar(self, source: str) -> None:
        """Nothing follows grammars here."""

    def rest(self) -> bool:
        """There is nothing to be done later."""
        return False

    def reset(self) -> None:
        self._rows.clear()

    def begin(
        self, plan: StepPlan, is_current: Callable[[], bool], problem: str = ""
    ) -> PendingStep:
        """It is done at once."""
        return PendingStep.done(self.step(plan, is_current, problem))

    def step(
        self,
        plan: StepPlan,
        is_current: Callable[[], bool] = lambda: True,
        problem: str = "",
    ) -> StepResult:
        """Rank 0's result has the tokens. Raises PlanError, where a model would refuse."""
        started = time.perf_counter_ns()
        if problem:
            raise PlanError(problem)
        self._apply(plan)
        rows, tokens, ends = [], [], []
        top: list[TopTokens] = []
        pooled: list[PooledStates] = []
        held = self._rows
        for row_id, count in zip(plan.rows, plan.counts, strict=True):
            row = held[row_id]
            row.uncomputed -= count
            if row.uncomputed > 0 or row.ended:
                continue
            if row.pooled:
                row.ended = True
                token, end = 0, RowEnd.POOLED
                pooled.append(PooledStates(row_id, 0, row.num_prompt, [1.0]))
            else:
                token, end = row.next_token()
            rows.append(row_id)
            tokens.append(token)
            ends.append(end)
            top.append(row.candidates)
        self.heartbeat.beat()
        result = StepResult(plan.epoch, plan.sequence)
        if not self.identity.rank:
            logprobs = [0.0] * len(rows)
            result = replace(
                result,
                rows=rows,
                token_ids=tokens,
                ends=ends,
                logprobs=logprobs,
                top=top if any(entry is not _NO_TOP for entry in top) else (),
                pooled=pooled,
            )
        spent = time.perf_counter_ns() - started
        return replace(result, forward_ns=spent, total_ns=spent)

    def _apply(self, plan: StepPlan) -> None:
        """Takes the plan's changes, in the order that shard.proto gives."""
        if plan.reset:
            self._rows.clear()
        for row_id in plan.removed:
            self._rows.pop(row_id, None)
        for new in plan.new_rows:
            self._rows[new.id] = self._new_row(new)
        for fork in plan.forks:
            known = fork.num_tokens + len(fork.token_ids)
            self._rows[fork.child] = self._rows[fork.parent].fork(known)

    def _new_row(self, new: NewRow) -> _Row:
        known = len(new.prompt_ids) + len(new.output_ids)
        return _Row(
            script=[token for token in new.prompt_ids if token not in self._eos] or [0],
            stop_token_ids=frozenset(new.sampling.stop_token_ids),
            left=new.sampling.max_new_tokens - len(new.output_ids),
            given=len(new.output_ids),
            uncomputed=known - new.num_computed_tokens,
            num_prompt=len(new.prompt_ids),
            pooled=new.sampling.pooling is not Pooling.NONE,
            candidates=_candidates(new),
        )


def _candidates(new: NewRow) -> TopTokens:
    count = new.sampling.top_n_tokens if new.lockstep else 0
    return TopTokens(range(count), [0.0] * count) if count else _NO_TOP
