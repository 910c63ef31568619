"""A plan while it is being made, and what must be remembered of it until its result is back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from headgate.proto.messages import Fork, NewRow, StepPlan
from headgate.router.request import Request

PlannedRow = tuple[Request, int, bool]  # request, tokens to compute, whether that samples a token


@dataclass(frozen=True, slots=True)
class OutstandingStep:
    """A plan whose result is not back."""

    epoch: int
    sequence: int
    rows: list[PlannedRow]  # in batch order
    forked: list[Request]  # those of them that begin with a copy of another's KV

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
    forked: list[Request] = field(default_factory=list)
    _forks: list[Fork] = field(default_factory=list)
    _copies: list[tuple[int, int]] = field(default_factory=list)
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
        self._compute(row, count)

    def add_fork(
        self, child: Request, parent: Request, num_tokens: int, copies: Sequence[tuple[int, int]]
    ) -> None:
        """Computes the last token of `child`, whose first `num_tokens` are the parent's and whose
        table is a fork of its table, with these blocks to be copied.
        """
        assert parent.row_sent and not child.row_sent
        start = num_tokens - len(child.prompt_ids)
        fork = Fork(
            parent=parent.id,
            child=child.id,
            sample_index=child.sampling.sample_index,
            block_ids=tuple(child.block_ids),
            num_tokens=num_tokens,
            token_ids=tuple(child.output_ids[start:]),
        )
        self._forks.append(fork)
        self._copies.extend(copies)
        child.row_sent = True
        self.forked.append(child)
        self._compute(child, 1)

    def planned_before(self, row: Request) -> int:
        """KV positions of the row that earlier plans compute."""
        return row.num_scheduled - sum(count for planned, count, _ in self.rows if planned is row)

    def _compute(self, row: Request, count: int) -> None:
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
            forks=self._forks,
            copies=self._copies,
            removed=removed,
            block_rows=self._block_rows,
            block_ids=self._block_ids,
            reset=reset,
        )

    def outstanding(self) -> OutstandingStep:
        return OutstandingStep(self.epoch, self.sequence, self.rows, self.forked)


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
