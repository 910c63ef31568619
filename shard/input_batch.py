"""InputBatch: every row the shard holds, as columns that live from step to step.

`apply` takes a StepPlan's changes, `advance` a step's tokens; nothing else changes it but StepRows,
which takes the tokens of most steps. Where tokens become known later, `expect` and `settle` take
the place of `advance`, and a plan may be applied in between. It knows neither
tensors on the device nor how tokens are chosen. All ranks hold the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from headgate.proto.messages import Fork, NewRow, Pooling, RowEnd, StepPlan
from headgate.shard.batch_limits import BatchLimits
from headgate.shard.drafts import guess
from headgate.shard.last_tokens import codes
from headgate.shard.sampling.grammar import NO_MASKS, ConstrainedRow, Masks, RowGrammar
from headgate.shard.sampling.params import (
    NO_TOKEN,
    PARAMS_DTYPE,
    History,
    IntArray,
    SampledRows,
    params_record,
)
from headgate.shard.sampling.penalties import needs_history
from headgate.shard.sampling.token_bias import TokenBias
from headgate.shard.scheduled_rows import Draws, ExpectedTokens, ScheduledRows, unrolled


class PlanError(ValueError):
    """A plan that does not fit the rows held. The message says which row and why."""


class InputBatch:
    """Rows by slot. Columns are read by others (ModelRunner, step_inputs) and written here only."""

    def __init__(self, limits: BatchLimits, eos_token_ids: Sequence[int]) -> None:
        self.limits = limits
        self.eos_token_ids = np.array(
            sorted(token for token in eos_token_ids if token < limits.vocab_size), np.int64
        )
        self._num_tenants = 0  # rows ever held
        self._guessing = False  # how many tokens rows have got is not known before `settle`
        self.changes = 0  # grows whenever rows come, go, move or get another token
        self.clear()

    def clear(self) -> None:
        """Forgets all rows."""
        self.changes += 1
        self._guessing = False
        self._slots: dict[int, int] = {}
        self._free: list[int] = []
        self._allocate(max(1, self.limits.expected_rows))

    def _allocate(self, capacity: int) -> None:
        """Columns for `capacity` rows. Their pages are zero and take memory only once written."""
        limits = self.limits
        self.ids = np.zeros(capacity, np.int64)
        self.tenants = np.zeros(capacity, np.int64)  # a number of each row's own, ids come again
        # Below zero: a token still to be settled, see last_tokens.py.
        self.token_ids = np.zeros((capacity, limits.max_total_tokens), np.int32)
        self.num_prompt = np.zeros(capacity, np.int64)
        self.num_tokens = np.zeros(capacity, np.int64)  # known: prompt and output
        self.num_computed = np.zeros(capacity, np.int64)  # whose KV is there
        self.block_tables = np.zeros((capacity, limits.max_row_blocks), np.int32)
        self.num_blocks = np.zeros(capacity, np.int64)
        self.params = np.zeros(capacity, PARAMS_DTYPE)
        self.ended = np.zeros(capacity, np.bool_)  # by this shard: dead in later plans
        self.constrained = np.zeros(capacity, np.bool_)  # the row has a grammar
        self.plain = np.zeros(capacity, np.bool_)  # it asks for the likeliest tokens and no more
        self.simple = np.zeros(capacity, np.bool_)  # for tokens, and ends by EOS or their number
        self.most_tokens = np.zeros(capacity, np.int64)  # known when its length ends it
        self.heeds_eos = np.zeros(capacity, np.bool_)
        self.stop_ids: list[frozenset[int]] = [frozenset()] * capacity
        self.grammars: list[RowGrammar | None] = [None] * capacity
        self.biases: list[TokenBias | None] = [None] * capacity
        self._free.extend(range(capacity - 1, -1, -1))

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, row_id: int) -> bool:
        return row_id in self._slots

    def slot_of(self, row_id: int) -> int:
        """Raises PlanError for a row that is not held."""
        try:
            return self._slots[row_id]
        except KeyError:
            raise PlanError(f"row {row_id} is unknown") from None

    # ------------------------------------------------------------ a plan's changes

    def apply(self, plan: StepPlan) -> ScheduledRows:
        """Takes the plan's changes; returns the rows to compute. Raises PlanError."""
        self.change(plan)
        return self.schedule(plan)

    def change(self, plan: StepPlan) -> None:
        """Takes the plan's changes in the documented order.

        Raises PlanError for what does not fit. The batch may then be half changed, and only a plan
        with `reset` makes it whole again.
        """
        if plan.reset:
            self.clear()
        for row_id in plan.removed:
            self._remove(row_id)
        for row in plan.new_rows:
            self._add(row)
        for fork in plan.forks:
            self._fork(fork)
        for row_id, token in plan.choices:
            self._choose(self.slot_of(row_id), token)
        for pair in plan.copies:
            self._check_blocks(pair, "a block copy")
        self._take_blocks(plan)

    def _take_blocks(self, plan: StepPlan) -> None:
        if len(plan.block_rows) != len(plan.block_ids):
            raise PlanError(f"{len(plan.block_ids)} new blocks for {len(plan.block_rows)} rows")
        for row_id, block in zip(plan.block_rows, plan.block_ids, strict=True):
            self._append_blocks(self.slot_of(row_id), (block,))

    def _remove(self, row_id: int) -> None:
        slot = self._slots.pop(row_id, None)
        if slot is not None:
            self.changes += 1
            self.grammars[slot] = None
            self.tenants[slot] = 0
            self._free.append(slot)

    def _new_slot(self, row_id: int) -> int:
        if row_id in self._slots:
            raise PlanError(f"row {row_id} is already here")
        if not self._free:
            self._grow()
        self.changes += 1
        slot = self._slots[row_id] = self._free.pop()
        self.ids[slot] = row_id
        self._num_tenants += 1
        self.tenants[slot] = self._num_tenants
        self.num_blocks[slot] = 0
        self.ended[slot] = False
        return slot

    def _grow(self) -> None:
        columns = [name for name, value in vars(self).items() if isinstance(value, np.ndarray)]
        columns.remove("eos_token_ids")
        old = {name: getattr(self, name) for name in columns}
        lists = {name: value for name, value in vars(self).items() if isinstance(value, list)}
        capacity = len(self.ids)
        self._allocate(2 * capacity)
        for name in columns:
            getattr(self, name)[:capacity] = old[name]
        for name in ("stop_ids", "grammars", "biases"):
            getattr(self, name)[:capacity] = lists[name]
        self._free = list(range(2 * capacity - 1, capacity - 1, -1))

    def _add(self, row: NewRow) -> None:
        known, sampling = len(row.prompt_ids) + len(row.output_ids), row.sampling
        if problem := self.limits.problem_of(row):
            raise PlanError(f"row {row.id} {problem}")
        tokens = np.array([*row.prompt_ids, *row.output_ids], np.int64)
        if tokens.min() < 0 or tokens.max() >= self.limits.vocab_size:
            raise PlanError(f"row {row.id} holds a token outside the vocabulary")
        slot = self._new_slot(row.id)
        self.token_ids[slot, :known] = tokens
        self.num_prompt[slot] = len(row.prompt_ids)
        self.num_tokens[slot] = known
        self.num_computed[slot] = row.num_computed_tokens
        self.params[slot] = params_record(sampling)
        self.stop_ids[slot] = frozenset(sampling.stop_token_ids)
        self.constrained[slot] = bool(sampling.grammar)
        self.grammars[slot] = RowGrammar(sampling.grammar) if sampling.grammar else None
        self.biases[slot] = TokenBias.of(sampling, self.limits.vocab_size)
        self.plain[slot], self.simple[slot] = self._is_plain(slot), self._is_simple(slot)
        self.most_tokens[slot] = len(row.prompt_ids) + sampling.max_new_tokens
        self.heeds_eos[slot] = bool(sampling.grammar) or not sampling.ignore_eos
        self._append_blocks(slot, row.block_ids)

    def _is_plain(self, slot: int) -> bool:
        wishes = self.params[slot : slot + 1]
        asked = ("logprobs", "top_n_tokens", "prompt_logprobs", "temperature")
        return not (
            self.constrained[slot]
            or self.biases[slot] is not None
            or needs_history(wishes).any()
            or any(wishes[name][0] for name in asked)
            or (wishes["min_new_tokens"][0] and len(self._ending_tokens(slot, early=True)))
            or wishes["pooling"][0] != Pooling.NONE
        )

    def _is_simple(self, slot: int) -> bool:
        return not (
            self.constrained[slot]
            or self.stop_ids[slot]
            or self.params["prompt_logprobs"][slot]
            or self.params["pooling"][slot] != Pooling.NONE
        )

    def _fork(self, fork: Fork) -> None:
        parent = self.slot_of(fork.parent)
        shared, known = fork.num_tokens, fork.num_tokens + len(fork.token_ids)
        self._check_fork(fork, parent, known)
        child = self._new_slot(fork.child)
        self.num_prompt[child] = self.num_prompt[parent]
        self.num_tokens[child] = known
        self.num_computed[child] = known - 1
        self.token_ids[child, :shared] = self.token_ids[parent, :shared]
        self.token_ids[child, shared:known] = fork.token_ids
        self.params[child] = self.params[parent]
        self.constrained[child] = self.constrained[parent]
        self.params[child]["sample_index"] = fork.sample_index
        self.stop_ids[child] = self.stop_ids[parent]
        self.biases[child] = self.biases[parent]
        self.plain[child], self.simple[child] = self.plain[parent], self.simple[parent]
        self.most_tokens[child] = self.most_tokens[parent]
        self.heeds_eos[child] = self.heeds_eos[parent]
        grammar = self.grammars[parent]
        num_output = shared - int(self.num_prompt[parent])
        self.grammars[child] = grammar.fork(max(num_output, 0)) if grammar is not None else None
        self._append_blocks(child, fork.block_ids)

    def _check_fork(self, fork: Fork, parent: int, known: int) -> None:
        """`parent`: its slot; `known`: tokens of the child."""
        problem = ""
        if fork.num_tokens > self.num_tokens[parent]:
            problem = f"shares {fork.num_tokens} tokens of {self.num_tokens[parent]}"
        elif known < self.num_prompt[parent]:
            problem = f"has {known} tokens of a prompt of {self.num_prompt[parent]}"
        elif known - 1 > min(self.num_computed[parent], fork.num_tokens):
            problem = "begins with tokens whose KV its parent does not have"
        elif known - self.num_prompt[parent] >= self.params["max_new_tokens"][parent]:
            problem = "has all of its tokens already"
        elif known - 1 > len(fork.block_ids) * self.limits.block_size:
            problem = "has fewer blocks than its tokens fill"
        elif any(not 0 <= token < self.limits.vocab_size for token in fork.token_ids):
            problem = "holds a token outside the vocabulary"
        if problem:
            raise PlanError(f"row {fork.child}, a fork, {problem}")

    def _choose(self, slot: int, token: int) -> None:
        last = self.num_tokens[slot] - 1
        if not 0 <= token < self.limits.vocab_size:
            raise PlanError(f"row {self.ids[slot]} gets a token outside the vocabulary")
        if last < self.num_prompt[slot] or self.num_computed[slot] > last:
            raise PlanError(f"row {self.ids[slot]} has no last token that could be replaced")
        self.token_ids[slot, last] = token
        self.changes += 1

    def _append_blocks(self, slot: int, blocks: Sequence[int]) -> None:
        row_id = self.ids[slot]
        self._check_blocks(blocks, f"row {row_id}")
        start = self.num_blocks[slot]
        if start + len(blocks) > self.limits.max_row_blocks:
            raise PlanError(f"row {row_id} gets more blocks than it can ever fill")
        self.block_tables[slot, start : start + len(blocks)] = blocks
        self.num_blocks[slot] += len(blocks)

    def _check_blocks(self, blocks: Sequence[int], owner: str) -> None:
        for block in blocks:
            if not 0 <= block < self.limits.num_blocks:
                raise PlanError(f"{owner} refers to block {block} of {self.limits.num_blocks}")

    def schedule(self, plan: StepPlan) -> ScheduledRows:
        """The rows to compute of a plan whose changes have been taken. Raises PlanError."""
        if len(plan.rows) != len(plan.counts):
            raise PlanError(f"{len(plan.counts)} counts for {len(plan.rows)} rows")
        if len(set(plan.rows)) != len(plan.rows):
            raise PlanError("a row is scheduled twice in one plan")
        slots = np.array([self.slot_of(row_id) for row_id in plan.rows], np.int64)
        counts = np.array(plan.counts, np.int64)
        full = self.num_tokens[slots] >= self.most_tokens[slots]  # ended, though not settled yet
        alive = ~(self.ended[slots] | full)
        slots, counts = slots[alive], counts[alive]
        if counts.sum() > self.limits.max_step_tokens:
            raise PlanError(
                f"{counts.sum()} tokens in one step, and {self.limits.max_step_tokens} are the most"
            )
        after, known = self.num_computed[slots] + counts, self.num_tokens[slots]
        self._refuse_if(counts < 1, slots, "is scheduled for no token")
        self._refuse_if(after > known, slots, "is scheduled for tokens that are not known yet")
        room = self.num_blocks[slots] * self.limits.block_size
        self._refuse_if(after > room, slots, "is scheduled for more tokens than its blocks hold")
        samples = after == known
        drafts = np.zeros(len(slots), np.int64)
        if any(plan.drafts):
            if len(plan.drafts) != len(plan.rows):
                raise PlanError(f"{len(plan.drafts)} numbers of guesses for {len(plan.rows)} rows")
            most = np.array(plan.drafts, np.int64)[alive] * (samples & ~self.constrained[slots])
            left = min(self.limits.max_step_tokens - int(counts.sum()), plan.most_drafts)
            self._guess(slots, most, left, drafts)
        return ScheduledRows(slots, counts, samples, drafts)

    def _guess(self, slots: IntArray, most: IntArray, room: int, drafts: IntArray) -> None:
        """Puts guesses behind the rows' tokens, their numbers into `drafts`: as far as a row's
        blocks, its length and the step have room."""
        known, blocks = self.num_tokens[slots], self.num_blocks[slots] * self.limits.block_size
        limit = np.minimum(self.most_tokens[slots] - 1, blocks) - known
        room_each = room // max(len(slots), 1)
        for row, slot in enumerate(slots.tolist()):
            wanted = min(int(most[row]), int(limit[row]), room)
            if wanted > 0:
                drafts[row] = guess(self.token_ids[slot], int(known[row]), wanted, room_each)
                room -= int(drafts[row])

    def _refuse_if(self, wrong: npt.NDArray[np.bool_], slots: IntArray, problem: str) -> None:
        if wrong.any():
            raise PlanError(f"row {self.ids[slots[wrong][0]]} {problem}")

    # ------------------------------------------------------------ a step's outcome

    def advance(self, scheduled: ScheduledRows, tokens: IntArray) -> npt.NDArray[np.uint8]:
        """Takes a token for each of `draws`, or NO_TOKEN; returns the RowEnds of those that count.

        A pooled row's token counts for nothing.
        """
        return self.settle(self.expect(scheduled), tokens)[1]

    def draws(self, scheduled: ScheduledRows) -> Draws:
        """The tokens that are to be sampled."""
        slots, drafts = scheduled.slots[scheduled.samples], scheduled.drafts[scheduled.samples]
        if not drafts.any():
            return Draws.next(slots)
        places, ahead = unrolled(drafts + 1)
        return Draws(slots[places], ahead)

    def expect(self, scheduled: ScheduledRows) -> ExpectedTokens:
        """As if the rows had their tokens: until `settle`, codes (last_tokens.py) stand for them.

        Only one step's tokens may be outstanding when the next is built, and none after guesses.
        """
        self.num_computed[scheduled.slots] += scheduled.counts
        slots, drafts = scheduled.slots[scheduled.samples], scheduled.drafts[scheduled.samples]
        positions = self.num_tokens[slots]
        self._guessing = bool(drafts.any())
        if not self._guessing:  # else the guesses are there
            self.token_ids[slots, positions] = codes(len(slots))
        self.num_tokens[slots] += 1
        return ExpectedTokens(slots, self.tenants[slots], positions, drafts)

    def settle(
        self, expected: ExpectedTokens, tokens: IntArray
    ) -> tuple[IntArray, npt.NDArray[np.uint8]]:
        """(which of the tokens count, in order; their RowEnds).

        tokens: one for each of the step's `draws`. None counts of a row that was removed since, or
        that the token before has ended. A token after a guess counts if that was what the row
        sampled in its place, and so on back to the first.

        A row may end here, by EOS before a stop token before length. The decision needs only the
        tokens, so every rank comes to the same. EOS always ends a row with a grammar, which allows
        it only where nothing else is left if the row is to ignore it.
        """
        here = self.tenants[expected.slots] == expected.tenants
        here &= ~self.ended[expected.slots]
        if self._guessing:
            return self._settle_guesses(expected, here, tokens)
        slots, positions = expected.slots[here], expected.positions[here]
        ends = self._take(slots, positions, tokens[here])
        self.ended[slots] = ends != RowEnd.NONE
        return np.flatnonzero(here), ends

    def _settle_guesses(
        self, expected: ExpectedTokens, here: npt.NDArray[np.bool_], tokens: IntArray
    ) -> tuple[IntArray, npt.NDArray[np.uint8]]:
        """`here`: which of the rows count."""
        self._guessing = False
        rows, ahead = unrolled(expected.drafts + 1)
        slots, positions = expected.slots[rows], expected.positions[rows] + ahead
        right = self.token_ids[slots, positions] == tokens  # what was guessed after them
        ends = self._ends(slots, positions, tokens)
        counts = np.zeros(len(tokens), np.bool_)
        first = 0
        for row in range(len(expected.slots)):
            last = first + int(expected.drafts[row])
            if here[row]:
                stop = first
                while stop < last and right[stop] and not ends[stop]:
                    stop += 1
                counts[first : stop + 1] = True
                slot = expected.slots[row]
                self.num_computed[slot] += stop - first
                self.num_tokens[slot] += stop - first
                self.ended[slot] = ends[stop] != RowEnd.NONE
            first = last + 1
        places = np.flatnonzero(counts)
        self.token_ids[slots[places], positions[places]] = np.maximum(tokens[places], 0)
        return places, ends[places]

    def _take(
        self, slots: IntArray, positions: IntArray, tokens: IntArray
    ) -> npt.NDArray[np.uint8]:
        """Puts the tokens there; their RowEnds."""
        self.token_ids[slots, positions] = np.maximum(tokens, 0)
        return self._ends(slots, positions, tokens)

    def _ends(
        self, slots: IntArray, positions: IntArray, tokens: IntArray
    ) -> npt.NDArray[np.uint8]:
        """The RowEnds of tokens at these positions."""
        failed = tokens == NO_TOKEN
        ends = np.zeros(len(slots), np.uint8)
        ends[positions + 1 >= self.most_tokens[slots]] = RowEnd.LENGTH
        for index, slot in enumerate(slots.tolist()):
            if self.stop_ids[slot] and int(tokens[index]) in self.stop_ids[slot]:
                ends[index] = RowEnd.STOP_TOKEN
        # Faster than isin, for there are few.
        is_eos = (tokens[:, None] == self.eos_token_ids).any(axis=1)
        ends[is_eos & self.heeds_eos[slots]] = RowEnd.EOS
        ends[failed] = RowEnd.FAILED
        if not self.plain[slots].all():
            ends[self.params["pooling"][slots] != Pooling.NONE] = RowEnd.POOLED
        return ends

    def must_settle(self, plan: StepPlan) -> bool:
        """Whether the plan cannot be applied, or its rows not be sampled, before all is settled.

        So it is for a plan that resets, forks or chooses tokens of beams; and for rows whose next
        token is made out on the host from those before, by a grammar, a watermark or as a guess.
        """
        if plan.reset or plan.forks or plan.choices or plan.drafts or self._guessing:
            return True
        slots = [slot for row in plan.rows if (slot := self._slots.get(row)) is not None]
        return bool(self.constrained[slots].any()) or self.is_watermarked(np.array(slots, np.int64))

    def is_watermarked(self, slots: IntArray) -> bool:
        """Whether one of these rows has a watermark."""
        return bool((self.params["watermark_gamma"][slots] > 0).any())

    # ------------------------------------------------------------ reading

    def constrained_rows(self, slots: IntArray) -> list[ConstrainedRow]:
        """Those of `slots` that have a grammar."""
        found = []
        for slot in slots[self.constrained[slots]].tolist():
            grammar = self.grammars[slot]
            assert grammar is not None
            output = self.token_ids[slot, self.num_prompt[slot] : self.num_tokens[slot]]
            found.append(ConstrainedRow(slot, grammar, output))
        return found

    def sampled_rows(self, draws: Draws, masks: Masks = NO_MASKS) -> SampledRows:
        """What the sampler has to know of the `draws`; `masks`: what grammars say."""
        slots = draws.slots
        params, ends = self.params[slots], self.num_tokens[slots] + draws.ahead
        positions = ends - self.num_prompt[slots]
        histories = {
            row: History(self.token_ids[slots[row], : ends[row]], int(self.num_prompt[slots[row]]))
            for row in np.flatnonzero(needs_history(params)).tolist()
        }
        early = positions < params["min_new_tokens"]
        endless = self.constrained[slots] & params["ignore_eos"]
        banned = {
            row: ids
            for row in np.flatnonzero(early | endless).tolist()
            if len(ids := self._ending_tokens(slots[row], early=bool(early[row])))
        }
        biases: dict[int, TokenBias] = {}
        allowed: dict[int, npt.NDArray[np.bool_]] = {}
        for row, slot in enumerate(slots.tolist()):
            bias = self.biases[slot]
            if bias is not None:
                biases[row] = bias
                if bias.bad_words is not None:
                    output = self.token_ids[slot, self.num_prompt[slot] : ends[row]]
                    completing = bias.bad_words.completing(output)
                    if completing:
                        banned[row] = np.array([*banned.get(row, ()), *completing], np.int64)
            if slot in masks.allowed:
                allowed[row] = masks.allowed[slot]
            elif bias is not None and bias.allowed is not None:
                allowed[row] = bias.allowed
        return SampledRows(params, positions, histories, banned, allowed, biases)

    def _ending_tokens(self, slot: int, early: bool) -> IntArray:
        """What would end a row before its length does; unless it is early, without stop tokens."""
        ids: set[int] = set()
        if early:
            ids.update(token for token in self.stop_ids[slot] if token < self.limits.vocab_size)
        if self.constrained[slot] or not self.params["ignore_eos"][slot]:
            ids.update(self.eos_token_ids.tolist())
        return np.array(sorted(ids), np.int64)
