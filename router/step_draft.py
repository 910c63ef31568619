"""A plan while it is being made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from headgate.proto.messages import Fork, NewRow, StepPlan
from headgate.router.outstanding_steps import OutstandingStep, PlannedRow
from headgate.router.request import Request


@dataclass(slots=True)
class StepDraft:
    """Rows are added in batch order; each addition moves the request's `num_scheduled`."""

    epoch: int
    sequence: int
    budget: int  # tokens left
    most_guesses: int = 0  # that shards may make in all
    preempted: bool = False  # someone gave way to a row of this step
    holds_prompt: bool = False  # it computes a part of a prompt, or of an output anew
    rows: list[PlannedRow] = field(default_factory=list)
    forked: list[Request] = field(default_factory=list)  # those that begin with a copy of KV
    filled: list[int] = field(default_factory=list)  # blocks, with known tokens
    _forks: list[Fork] = field(default_factory=list)
    _copies: list[tuple[int, int]] = field(default_factory=list)
    _choices: list[tuple[int, int]] = field(default_factory=list)
    _new_rows: list[NewRow] = field(default_factory=list)
    _block_rows: list[int] = field(default_factory=list)
    _block_ids: list[int] = field(default_factory=list)

    def add(self, row: Request, count: int, blocks: Sequence[int], num_guesses: int = 0) -> None:
        """Computes `count` tokens more of `row`, whose table has just grown by `blocks`, and up to
        `num_guesses` that the shards guess."""
        if not row.row_sent:
            self._send(row)
        else:
            if row.beams is not None and row.num_scheduled >= row.num_prefill_tokens:
                self._choices.append((row.id, row.output_ids[-1]))
            if blocks:
                self._block_rows.extend([row.id] * len(blocks))
                self._block_ids.extend(blocks)
        row.num_scheduled = scheduled = row.num_scheduled + count
        row.in_flight += 1
        if num_guesses:
            row.drafts_in_flight += num_guesses
        row.last_sequence = self.sequence
        self.budget -= count
        known = row.num_prefill_tokens
        if scheduled <= known and (count > 1 or scheduled <= len(row.prompt_ids)):
            self.holds_prompt = True
        self.rows.append((row, count, num_guesses, scheduled, scheduled >= known))

    def _send(self, row: Request) -> None:
        """Tells the shards of a row: as a fork where it is one of a row that they know."""
        parent = row.fork_of
        if parent is not None or row.copies:
            self.forked.append(row)
            self._copies.extend(row.copies)
            row.fork_of, row.copies = None, []
        if parent is not None and parent.row_sent:
            self._forks.append(_fork(row, parent))
        else:
            self._new_rows.append(_new_row(row))
        row.row_sent = True

    def holds(self, row: Request) -> bool:
        """Whether the row, or one that would have to give way with it, is in the plan."""
        beams = row.beams
        return any(
            planned is row or (beams is not None and planned.beams is beams)
            for planned, *_ in self.rows
        )

    def planned_before(self, row: Request) -> int:
        """KV positions of the row that earlier plans compute."""
        return row.num_scheduled - sum(count for planned, count, *_ in self.rows if planned is row)

    def plan(self, removed: Sequence[int], reset: bool) -> StepPlan:
        drafts: Sequence[int] = ()
        if self.most_guesses and not self.holds_prompt:  # no long step becomes longer
            drafts = [num_guesses for _, _, num_guesses, _, _ in self.rows]
        guessing = any(drafts)
        return StepPlan(
            epoch=self.epoch,
            sequence=self.sequence,
            rows=[request.id for request, _, _, _, _ in self.rows],
            counts=[count for _, count, _, _, _ in self.rows],
            drafts=drafts if guessing else (),
            most_drafts=self.most_guesses if guessing else 0,
            new_rows=self._new_rows,
            forks=self._forks,
            copies=self._copies,
            choices=self._choices,
            removed=removed,
            block_rows=self._block_rows,
            block_ids=self._block_ids,
            reset=reset,
        )

    def outstanding(self, plan: StepPlan) -> OutstandingStep:
        """What is to be remembered of `plan`, which `plan` has made."""
        return OutstandingStep(
            self.epoch, self.sequence, self.rows, plan.rows, self.forked, self.filled
        )


def _fork(row: Request, parent: Request) -> Fork:
    """All the row's tokens but the last are the parent's, and their KV."""
    return Fork(
        parent=parent.id,
        child=row.id,
        sample_index=row.sampling.sample_index,
        block_ids=tuple(row.block_ids),
        num_tokens=row.num_scheduled,
        token_ids=tuple(row.token_ids(row.num_scheduled, row.num_tokens)),
    )


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
