"""A plan while it is being made, and what must be remembered of it until its result is back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from headgate.proto.messages import NewRow, StepPlan
from headgate.router.request import Request

PlannedRow = tuple[Request, int, bool]  # request, tokens to compute, whether that samples a token


@dataclass(frozen=True, slots=True)
class OutstandingStep:
    """A plan whose result is not back."""

    epoch: int
    sequence: int
    rows: list[PlannedRow]  # in batch order

    @property
    def num_tokens(self) -> int:
        return sum(count for _, count, _ in self.rows)


@dataclass(slots=True)
class StepDraft:
    """Rows are added in batch order; each addition moves the request's `num_scheduled`."""

    epoch: int
    sequence: int
    budget: int  # tokens left
    preempted: bool = False  # someone gave way to a row of this step
    rows: list[PlannedRow] = field(default_factory=list)
    _new_rows: list[NewRow] = field(default_factory=list)
    _block_rows: list[int] = field(default_factory=list)
    _block_ids: list[int] = field(default_factory=list)

    def add(self, row: Request, count: int, blocks: Sequence[int]) -> None:
        """Computes `count` tokens more of `row`, whose table has just grown by `blocks`."""
        if not row.row_sent:
            self._new_rows.append(_new_row(row))
            row.row_sent = True
        elif blocks:
            self._block_rows.extend([row.id] * len(blocks))
            self._block_ids.extend(blocks)
        row.num_scheduled += count
        row.in_flight += 1
        row.last_sequence = self.sequence
        self.budget -= count
        self.rows.append((row, count, row.num_scheduled >= row.num_prefill_tokens))

    def plan(self, removed: Sequence[int], reset: bool) -> StepPlan:
        return StepPlan(
            epoch=self.epoch,
            sequence=self.sequence,
            rows=[request.id for request, _, _ in self.rows],
            counts=[count for _, count, _ in self.rows],
            new_rows=self._new_rows,
            removed=removed,
            block_rows=self._block_rows,
            block_ids=self._block_ids,
            reset=reset,
        )

    def outstanding(self) -> OutstandingStep:
        return OutstandingStep(self.epoch, self.sequence, self.rows)


def _new_row(row: Request) -> NewRow:
    return NewRow(
        id=row.id,
        prompt_ids=row.prompt_ids,
        sampling=row.sampling,
        output_ids=tuple(row.output_ids),
        num_computed_tokens=row.num_scheduled,
        block_ids=tuple(row.block_ids),
        lockstep=row.lockstep,
        adapter_id=row.adapter_id,
    )
