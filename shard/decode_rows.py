"""DecodeRows: rows that go on decoding as in the step before, without InputBatch's general way.

A plan that computes one token of each of the last plan's rows and changes nothing but their block
tables is what most plans are. Its inputs are laid out, and its tokens taken, by two calls into C++
on the very columns that InputBatch keeps, so either way may follow the other at any step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from headgate.kernels.cpu import library
from headgate.proto.messages import RowEnd, StepPlan
from headgate.shard.input_batch import InputBatch, ScheduledRows
from headgate.shard.sampling.params import IntArray


@dataclass(frozen=True, slots=True, eq=False)
class DecodeInputs:
    """A recorded step's inputs, where it finds them: its tokens and rows are at the front."""

    input_ids: IntArray
    positions: IntArray
    slot_mapping: IntArray
    cu_query_lens: npt.NDArray[np.int32]
    context_lens: npt.NDArray[np.int32]
    block_tables: npt.NDArray[np.int32]  # [most rows, most blocks]
    sample_tokens: IntArray


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
        self.slots = slots
        self.tokens = np.zeros(len(slots), np.int64)  # for `settle`
        self.greedy = bool(batch.plain[slots].all())
        self._row_ids, self._counts = plan.rows, plan.counts
        self._batch = batch
        self._changes = batch.changes
        self._num_ended = 0
        self._nothing_ended = [RowEnd.NONE] * len(slots)
        self._ends = np.zeros(len(slots), np.uint8)
        self._eos = batch.eos_token_ids
        loaded = library.load()
        assert loaded is not None, "there are recorded steps"
        self._library = loaded
        self._inputs = inputs
        self._table = self._lay_out(inputs)
        self._address = self._table.ctypes.data

    def _lay_out(self, inputs: DecodeInputs) -> IntArray:
        """decode_rows.cpp's DecodeRows. It holds while the batch has the same rows."""
        batch = self._batch
        fields: list[int | npt.NDArray[np.generic]] = [
            len(self.slots),
            self.slots,
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
            inputs.input_ids,
            inputs.positions,
            inputs.slot_mapping,
            inputs.cu_query_lens,
            inputs.context_lens,
            inputs.block_tables,
            inputs.block_tables.shape[1],
            inputs.sample_tokens,
            len(inputs.sample_tokens),
            self.tokens,
            self._ends,
        ]
        values = [field if isinstance(field, int) else field.ctypes.data for field in fields]
        return np.array(values, np.int64)

    def __len__(self) -> int:
        return len(self.slots)

    def continues(self, plan: StepPlan) -> bool:
        """Whether the plan computes a token of each of these rows, and changes no more than their
        block tables."""
        return (
            plan.rows == self._row_ids
            and plan.counts == self._counts
            and self._batch.changes == self._changes
            and not self._num_ended
            and not (plan.removed or plan.new_rows or plan.forks)
            and not (plan.choices or plan.copies or plan.reset)
        )

    def place(self) -> bool:
        """Lays out a step's inputs. False, and nothing is done: the plan does not fit the rows."""
        return bool(self._library.hg_decode_place(self._address))

    def settle(self, logits: int = 0, vocab_size: int = 0) -> list[RowEnd]:
        """Takes the rows' `tokens`, as InputBatch.settle; with `logits`, the address of
        float32[R, vocab_size], the likeliest ones."""
        self._num_ended = self._library.hg_decode_settle(self._address, logits, vocab_size)
        if not self._num_ended:
            return self._nothing_ended
        return [RowEnd(end) for end in self._ends.tolist()]
