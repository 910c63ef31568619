"""DecodeRows: rows that go on decoding as in the step before, without InputBatch's general way.

A plan that computes one token of each of the last plan's rows, and guesses after it, and changes
nothing but their block tables is what most plans are. Its inputs are laid out, and its tokens
taken, by two calls into C++ on the very columns that InputBatch keeps, so either way may follow the
other at any step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from headgate.kernels.cpu import library
from headgate.proto.messages import ROW_ENDS, RowEnd, StepPlan
from headgate.shard.input_batch import InputBatch
from headgate.shard.sampling.params import IntArray
from headgate.shard.scheduled_rows import Draws, ScheduledRows


@dataclass(frozen=True, slots=True, eq=False)
class DecodeInputs:
    """A recorded step's inputs, where it finds them: its tokens and rows are at the front."""

    input_ids: IntArray
    positions: IntArray
    slot_mapping: IntArray
    cu_query_lens: npt.NDArray[np.int32]
    context_lens: npt.NDArray[np.int32]
    block_tables: npt.NDArray[np.int32]  # [most rows, most blocks]
    wanted_tokens: IntArray


@dataclass(frozen=True, slots=True, eq=False)
class DecodedTokens:
    """What counts of the tokens that a step has sampled."""

    row_ids: list[int]  # of each
    token_ids: list[int]
    ends: list[RowEnd]
    places: IntArray  # of each among those sampled


class DecodeRows:
    """The rows of one plan, for the plans that go on with them."""

    @classmethod
    def of(
        cls, batch: InputBatch, plan: StepPlan, scheduled: ScheduledRows, inputs: DecodeInputs
    ) -> DecodeRows | None:
        """None where a row does more than decode, or its end takes more than a look at its token.

        `scheduled`: what `batch` made of the plan, which it has applied.
        """
        slots = scheduled.slots
        alike = len(slots) == len(plan.rows) and bool((scheduled.counts == 1).all())
        if not alike or not scheduled.samples.all() or batch.constrained[slots].any():
            return None
        if any(batch.stop_ids[slot] for slot in slots.tolist()):
            return None
        return cls(batch, plan, slots, inputs)

    def __init__(
        self, batch: InputBatch, plan: StepPlan, slots: IntArray, inputs: DecodeInputs
    ) -> None:
        self.greedy = bool(batch.plain[slots].all())
        self.num_tokens = 0  # of the step laid out
        most = batch.limits.max_step_tokens
        self._tokens = np.zeros(most, np.int64)
        self._slots = slots
        self._row_ids, self._counts = plan.rows, plan.counts
        self._ids = np.array(plan.rows, np.int64)
        self._drafts: Sequence[int] = ()  # that each row may be computed with; empty: none
        self._most_drafts = np.zeros(len(slots), np.int64)
        self._batch = batch
        self._changes = batch.changes
        self._draws = Draws(np.zeros(most, np.int64), np.zeros(most, np.int64))
        self._places = np.zeros(most, np.int64)
        self._result_rows = np.zeros(most, np.int64)
        self._ends = np.zeros(most, np.uint8)
        self._eos = batch.eos_token_ids
        loaded = library.load_keeping_gil()
        assert loaded is not None, "there are recorded steps"
        self._library = loaded
        self._inputs = inputs
        self._table = self._lay_out(inputs)
        self._address = self._table.ctypes.data

    def _lay_out(self, inputs: DecodeInputs) -> IntArray:
        """decode_rows.cpp's DecodeRows. It holds while the batch has the same rows."""
        batch = self._batch
        fields: list[int | npt.NDArray[np.generic]] = [
            len(self._slots),
            self._slots,
            batch.token_ids,
            batch.token_ids.shape[1],
            batch.num_tokens,
            batch.num_computed,
            batch.most_tokens,
            batch.block_tables,
            batch.block_tables.shape[1],
            batch.num_blocks,
            batch.ended,
            batch.heeds_eos,
            batch.limits.block_size,
            self._eos,
            len(self._eos),
            self._ids,
            self._most_drafts,
            len(self._tokens),
            inputs.input_ids,
            inputs.positions,
            inputs.slot_mapping,
            self._draws.slots,
            self._draws.ahead,
            inputs.cu_query_lens,
            inputs.context_lens,
            inputs.block_tables,
            inputs.block_tables.shape[1],
            inputs.wanted_tokens,
            self._tokens,
            self._places,
            self._result_rows,
            self._ends,
            0,  # rows that ended
        ]
        values = [field if isinstance(field, int) else field.ctypes.data for field in fields]
        return np.array(values, np.int64)

    def __len__(self) -> int:
        return len(self._slots)

    def continues(self, plan: StepPlan) -> bool:
        """Whether the plan computes a token of each of these rows, and changes no more than their
        block tables."""
        return (
            plan.rows == self._row_ids
            and plan.counts == self._counts
            and self._batch.changes == self._changes
            and not self._table[-1]  # none has ended
            and not (plan.removed or plan.new_rows or plan.forks)
            and not (plan.choices or plan.copies or plan.reset)
        )

    def place(self, plan: StepPlan) -> bool:
        """Lays out a step's inputs. False, and nothing is done: the plan does not fit the rows."""
        if plan.drafts != self._drafts:
            if plan.drafts and len(plan.drafts) != len(self):
                return False
            self._drafts, self._most_drafts[:] = plan.drafts, plan.drafts or 0
        self.num_tokens = self._library.hg_decode_place(self._address, plan.most_drafts)
        return self.num_tokens > 0

    @property
    def draws(self) -> Draws:
        """A token after each that is computed."""
        return self._draws.take(slice(self.num_tokens))

    def settle(self, sampled_at: int) -> DecodedTokens:
        """Takes the int64 tokens at this address, one after each token of the step, as
        InputBatch.settle."""
        count = self._library.hg_decode_settle(self._address, sampled_at)
        ends = [RowEnd.NONE] * count
        if self._table[-1]:
            ends = [ROW_ENDS[end] for end in self._ends[:count].tolist()]
        return DecodedTokens(
            self._result_rows[:count].tolist(),
            self._tokens[:count].tolist(),
            ends,
            self._places[:count],
        )
