"""StepRows: a plan's rows, laid out and settled without InputBatch's general way.

Most plans ask for nothing but tokens. The inputs of their steps are laid out where a replay finds
them, and their tokens taken, by two calls into C++ on the very columns that InputBatch keeps, so
either way may follow the other at any step.
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
from headgate.shard.scheduled_rows import Draws


@dataclass(frozen=True, slots=True, eq=False)
class StepArrays:
    """A recorded step's inputs, where it finds them: its tokens and rows are at the front."""

    input_ids: IntArray
    positions: IntArray
    slot_mapping: IntArray
    cu_query_lens: npt.NDArray[np.int32]
    context_lens: npt.NDArray[np.int32]
    block_tables: npt.NDArray[np.int32]  # [most rows, most blocks]
    wanted_tokens: IntArray


@dataclass(frozen=True, slots=True, eq=False)
class SettledTokens:
    """What counts of the tokens that a step has sampled."""

    row_ids: list[int]  # of each
    token_ids: list[int]
    ends: list[RowEnd]
    places: IntArray  # of each among those sampled


class StepRows:
    """The rows of one plan after the other, of an InputBatch."""

    def __init__(self, batch: InputBatch, inputs: StepArrays) -> None:
        self._batch = batch
        self._inputs = inputs
        self.num_tokens = 0  # of the step laid out
        most = batch.limits.max_step_tokens
        # Of the plan: its rows, those at the front.
        self._rows: Sequence[int] = ()
        self._counts: Sequence[int] = ()
        self._drafts: Sequence[int] = ()
        self._changes = -1  # of the batch, when the slots were found
        self._slots, self._row_ids = np.zeros(most, np.int64), np.zeros(most, np.int64)
        self._row_counts, self._most_drafts = np.zeros(most, np.int64), np.zeros(most, np.int64)
        self._live, self._row_draws = np.zeros(most, np.int64), np.zeros(most, np.int64)
        self._draws = Draws(np.zeros(most, np.int64), np.zeros(most, np.int64))
        self._tokens, self._places = np.zeros(most, np.int64), np.zeros(most, np.int64)
        self._result_rows, self._ends = np.zeros(most, np.int64), np.zeros(most, np.uint8)
        loaded = library.load_keeping_gil()
        assert loaded is not None, "there are recorded steps"
        self._library = loaded
        self._lay_out()

    def _lay_out(self) -> None:
        """step_rows.cpp's StepRows, which holds while the batch has the same columns."""
        batch, inputs = self._batch, self._inputs
        fields: dict[str, int | npt.NDArray[np.generic]] = {
            "count": 0,
            "slots": self._slots,
            "row_ids": self._row_ids,
            "counts": self._row_counts,
            "most_drafts": self._most_drafts,
            "most_step_tokens": len(self._slots),
            "token_ids": batch.token_ids,
            "most_positions": batch.token_ids.shape[1],
            "num_tokens": batch.num_tokens,
            "num_computed": batch.num_computed,
            "most_tokens": batch.most_tokens,
            "block_tables": batch.block_tables,
            "most_blocks": batch.block_tables.shape[1],
            "num_blocks": batch.num_blocks,
            "ended": batch.ended,
            "heeds_eos": batch.heeds_eos,
            "simple": batch.simple,
            "plain": batch.plain,
            "block_size": batch.limits.block_size,
            "eos": batch.eos_token_ids,
            "num_eos": len(batch.eos_token_ids),
            "input_ids": inputs.input_ids,
            "positions": inputs.positions,
            "slot_mapping": inputs.slot_mapping,
            "cu_query_lens": inputs.cu_query_lens,
            "context_lens": inputs.context_lens,
            "step_tables": inputs.block_tables,
            "most_step_blocks": inputs.block_tables.shape[1],
            "wanted_tokens": inputs.wanted_tokens,
            "draw_slots": self._draws.slots,
            "ahead": self._draws.ahead,
            "live": self._live,
            "draws": self._row_draws,
            "num_live": 0,
            "num_draws": 0,
            "num_drafts": 0,
            "all_plain": 0,
            "tokens": self._tokens,
            "places": self._places,
            "result_rows": self._result_rows,
            "ends": self._ends,
            "num_ended": 0,
        }
        values = [each if isinstance(each, int) else each.ctypes.data for each in fields.values()]
        self._table = np.array(values, np.int64)
        self._address = self._table.ctypes.data
        self._columns = batch.token_ids
        first = list(fields).index("num_live")
        self._laid_out = self._table[first : first + 4]  # what C++ says of a step
        self._num_ended = self._table[-1:]
        self._changes = -1

    def __len__(self) -> int:
        """Rows of the step laid out."""
        return int(self._laid_out[0])

    @property
    def num_draws(self) -> int:
        """Tokens that it samples."""
        return int(self._laid_out[1])

    @property
    def num_drafts(self) -> int:
        """Guesses in it."""
        return int(self._laid_out[2])

    @property
    def plain(self) -> bool:
        """As StepInputs.plain."""
        return bool(self._laid_out[3])

    @property
    def draws(self) -> Draws:
        """What is sampled after it."""
        return self._draws.take(slice(self.num_draws))

    def place(self, plan: StepPlan) -> bool:
        """Lays out the step of a plan whose changes the batch has taken.

        False, and nothing has changed: the plan does not fit, or a row asks for more than tokens.
        """
        if not self._take(plan):
            return False
        self.num_tokens = self._library.hg_step_place(self._address, plan.most_drafts)
        return self.num_tokens > 0

    def _take(self, plan: StepPlan) -> bool:
        """What the plan says of its rows; most of it is often as in the one before."""
        if self._batch.token_ids is not self._columns:
            self._lay_out()
        if plan.rows != self._rows or self._batch.changes != self._changes:
            self._changes = -1
            if not self._find_slots(plan.rows):
                return False
            self._rows, self._changes = plan.rows, self._batch.changes
        count = len(plan.rows)
        if len(plan.counts) != count or len(plan.drafts) not in (0, count):
            return False
        if plan.counts != self._counts:
            self._counts, self._row_counts[:count] = plan.counts, plan.counts
        if plan.drafts != self._drafts:
            self._drafts, self._most_drafts[:] = plan.drafts, 0
            self._most_drafts[: len(plan.drafts)] = plan.drafts
        return True

    def _find_slots(self, rows: Sequence[int]) -> bool:
        if len(rows) > len(self._slots) or len(set(rows)) != len(rows):
            return False
        if any(row not in self._batch for row in rows):
            return False
        self._table[0] = count = len(rows)
        self._row_ids[:count] = rows
        self._slots[:count] = [self._batch.slot_of(row) for row in rows]
        return True

    def settle(self, sampled_at: int) -> SettledTokens:
        """Takes the int64 tokens at this address, one for each of the draws, as
        InputBatch.settle."""
        count = self._library.hg_step_settle(self._address, sampled_at)
        ends = [RowEnd.NONE] * count
        if self._num_ended[0]:
            ends = [ROW_ENDS[end] for end in self._ends[:count].tolist()]
        return SettledTokens(
            self._result_rows[:count].tolist(),
            self._tokens[:count].tolist(),
            ends,
            self._places[:count],
        )
