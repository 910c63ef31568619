"""Where the next block is taken from: a request's blocks lie side by side, as far as that goes.

A CPU reads a row's keys faster where they lie in one piece (docs/performance-history.md,
"Blocks side by side"). So blocks are cut into runs of neighbours: a request that grows goes on in
the run of its last block, and begins another one where nobody else grows. Knows how many blocks of
each run are in which state, not which ones, nor what they hold (block_pool.py).
"""

from __future__ import annotations

from collections import OrderedDict
from enum import IntEnum


class State(IntEnum):
    """Of a block, see BlockPool."""

    FREE = 0
    CACHED = 1
    USED = 2


class BlockRuns:
    """Runs of `length` blocks, the last one perhaps shorter; all blocks are free at first.

    A run is empty (all blocks free), idle (none used, some cached) or busy (some used).
    """

    def __init__(self, num_blocks: int, length: int) -> None:
        self._num_blocks, self._length = num_blocks, length
        starts = range(0, num_blocks, length)
        self._counts = [[len(self._blocks_from(start)), 0, 0] for start in starts]  # by state
        runs = reversed(range(len(starts)))
        self._empty = OrderedDict.fromkeys(runs)  # the next to take is last
        self._idle: OrderedDict[int, None] = OrderedDict()  # longest unused first
        self._roomy: OrderedDict[int, None] = OrderedDict()  # those with free blocks among them
        self._shared: OrderedDict[int, None] = OrderedDict()  # busy ones with free blocks

    def _blocks_from(self, start: int) -> range:
        return range(start, min(start + self._length, self._num_blocks))

    def move(self, block: int, old: State, new: State) -> None:
        """A block of state `old` is of state `new` now."""
        run = block // self._length
        counts = self._counts[run]
        counts[old] -= 1
        counts[new] += 1
        if counts[old] and counts[new] > 1:
            return
        free, cached, used = counts
        _enlist(self._empty, run, not used and not cached)
        _enlist(self._idle, run, not used and cached > 0)
        _enlist(self._roomy, run, not used and cached > 0 and free > 0)
        _enlist(self._shared, run, used > 0 and free > 0)

    def beside(self, block: int) -> int | None:
        """The block after this one, if it is in the same run."""
        after = block + 1
        return after if after % self._length and after < self._num_blocks else None

    def with_room(self) -> range | None:
        """The blocks of a run in which nobody grows and some block is free."""
        if self._empty:
            return self._blocks_from(next(reversed(self._empty)) * self._length)
        return self._first_of(self._roomy)

    def longest_idle(self) -> range | None:
        """The blocks of the run in which the longest time none was used."""
        return self._first_of(self._idle)

    def shared(self) -> range | None:
        """The blocks of a run of which some are free, and some used."""
        return self._first_of(self._shared)

    def _first_of(self, runs: OrderedDict[int, None]) -> range | None:
        return self._blocks_from(next(iter(runs)) * self._length) if runs else None

    def check_integrity(self, states: list[State]) -> None:
        """Raises AssertionError unless each run is what the states of all blocks say."""
        for run, counts in enumerate(self._counts):
            inside = [states[block] for block in self._blocks_from(run * self._length)]
            assert counts == [inside.count(state) for state in State], f"counts of run {run}"
            free, cached, used = counts
            assert (run in self._empty) == (not used and not cached), f"run {run} empty"
            assert (run in self._idle) == (not used and cached > 0), f"run {run} idle"
            assert (run in self._roomy) == (run in self._idle and free > 0), f"run {run} roomy"
            assert (run in self._shared) == (used > 0 and free > 0), f"run {run} shared"


def _enlist(runs: OrderedDict[int, None], run: int, belongs: bool) -> None:
    """Has the run among `runs`, in its place or as the last, or not."""
    if belongs:
        runs.setdefault(run)
    else:
        runs.pop(run, None)
