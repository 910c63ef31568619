"""The rows of one request's beams: which of them carries which beam, round by round.

A round is over when every running beam's row has brought its best tokens. Then a beam that goes on
keeps its row with its first continuation; the others continue in rows whose beams did not
go on, as forks. It moves no blocks: the scheduler does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from headgate.proto.messages import TopTokens
from headgate.router.beam_search import BeamSearch

if TYPE_CHECKING:
    from headgate.router.request import Request


@dataclass(frozen=True, slots=True)
class RowFork:
    """A row that takes over another's tokens of the round before, and one more."""

    child: Request
    parent: Request
    token_id: int


@dataclass(slots=True, eq=False)
class BeamGroup:
    """`members` has a row for each beam there can be; the first computes the prompt."""

    search: BeamSearch
    members: Sequence[Request]
    ranked: list[Request] = field(default_factory=list)  # rows of the running beams, best first
    _candidates: dict[int, TopTokens] = field(default_factory=dict)  # by row id: this round's

    @classmethod
    def of(cls, search: BeamSearch, members: Sequence[Request]) -> BeamGroup:
        """Ties the members to a new group. Only the first of them is scheduled by its owner."""
        group = cls(search, members, [members[0]])
        for row in members:
            row.beams = group
            row.lockstep = True
        return group

    @property
    def width(self) -> int:
        return len(self.members)

    @property
    def running(self) -> list[Request]:
        """Rows that run now."""
        return [row for row in self.members if row.is_running]

    @property
    def is_complete(self) -> bool:
        """Whether the round is over."""
        return all(row.id in self._candidates for row in self.ranked)

    def num_rows(self, row: Request) -> int:
        """Rows that this one stands for: the best beam's holds the places of those to come."""
        return 1 + self.width - len(self.ranked) if row is self.ranked[0] else 1

    def take(self, row: Request, top: TopTokens) -> None:
        """The best tokens after the row's, best first."""
        self._candidates[row.id] = top

    def forget(self, row: Request) -> None:
        """The row will be computed anew, and brings its tokens again."""
        self._candidates.pop(row.id, None)

    def next_round(self) -> list[RowFork]:
        """Ends a complete round: rows that go on get their token, the forks are to be made.

        `ranked` then has the rows of the new beams; none when the search is done.
        """
        tops = [self._candidates[row.id] for row in self.ranked]
        self._candidates.clear()
        parents, continuations = self.ranked, self.search.advance(tops)
        going_on = {continuation.parent for continuation in continuations}
        kept = {parents[rank].id for rank in going_on}
        free = [row for row in self.members if row.id not in kept]
        forks: list[RowFork] = []
        own: list[tuple[Request, int]] = []
        self.ranked = []
        for continuation in continuations:
            row = parents[continuation.parent]
            if continuation.parent in going_on:  # its first: the best that continues it
                going_on.remove(continuation.parent)
                own.append((row, continuation.token_id))
            else:
                parent, row = row, free.pop(0)
                forks.append(RowFork(row, parent, continuation.token_id))
            self.ranked.append(row)
        for fork in forks:
            fork.child.output_ids = [*fork.parent.output_ids, fork.token_id]
            fork.child.block_hashes = []
        for row, token_id in own:
            row.output_ids.append(token_id)
        return forks
