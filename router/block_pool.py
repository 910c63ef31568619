"""KV blocks by number: who holds each, which are empty, which may be taken from the prefix cache.

Counts references only; it does not know what a block holds (prefix_cache.py) or whose it is
(kv_cache_manager.py). Which is taken next depends on where blocks lie (block_runs.py).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from headgate.router.block_runs import BlockRuns, State

_LONGEST_RUN = 8  # blocks
_FEWEST_RUNS = 64  # or as many as there are blocks


class BlockPool:
    """Blocks 0 .. num_blocks - 1. A block is in exactly one of three states:

    used    ref_count >= 1
    cached  ref_count 0, its content is wanted: taken when nothing is free but beside used blocks,
            longest unused first
    free    ref_count 0, content of no worth
    """

    def __init__(
        self, num_blocks: int, on_evict: Callable[[int], None], run_length: int | None = None
    ) -> None:
        """`on_evict(block)` is told of each cached block that is taken for something else.

        `run_length`: see block_runs.py; by default as long as pays, but with few blocks shorter.
        """
        if run_length is None:
            run_length = min(max(num_blocks // _FEWEST_RUNS, 1), _LONGEST_RUN)
        self._ref_counts = [0] * num_blocks
        self._num_free = num_blocks
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._retained: set[int] = set()  # blocks that become cached, not free, when released
        self._runs = BlockRuns(num_blocks, run_length)
        self._on_evict = on_evict

    @property
    def num_blocks(self) -> int:
        return len(self._ref_counts)

    @property
    def num_free(self) -> int:
        return self._num_free

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can give."""
        return self._num_free + len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_available

    def ref_count(self, block: int) -> int:
        return self._ref_counts[block]

    def allocate(self, count: int, after: int | None = None) -> list[int] | None:
        """`count` blocks with one reference each; None, and nothing done, if there are too few.

        `after`: the last block of the table that they continue, if there is one: they follow it in
        memory where they can.
        """
        if count > self.num_available:
            return None
        blocks = []
        for _ in range(count):
            after = self._next(after)
            self._ref_counts[after] = 1
            self._num_free -= 1
            self._runs.move(after, State.FREE, State.USED)
            blocks.append(after)
        return blocks

    def _next(self, after: int | None) -> int:
        """The free block to be taken next, there being one or a cached one."""
        beside = None if after is None else self._runs.beside(after)
        if beside is not None and self._is_free(beside):
            return beside
        run = self._runs.with_room()
        if run is None and (run := self._runs.longest_idle()) is not None:
            self._evict(block for block in run if block in self._cached)
        if run is None and (run := self._runs.shared()) is None:
            oldest = next(iter(self._cached))
            self._evict([oldest])
            return oldest
        return next(block for block in run if self._is_free(block))

    def _is_free(self, block: int) -> bool:
        return self._ref_counts[block] == 0 and block not in self._cached

    def _evict(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            self._free(block)
            self._retained.remove(block)
            self._on_evict(block)

    def _free(self, block: int) -> None:
        """A cached block's content is of no worth any more."""
        del self._cached[block]
        self._num_free += 1
        self._runs.move(block, State.CACHED, State.FREE)

    def share(self, block: int) -> None:
        """One more reference to a used or cached block."""
        if self._ref_counts[block] == 0:
            del self._cached[block]  # KeyError: the block is free, its content is gone
            self._runs.move(block, State.CACHED, State.USED)
        self._ref_counts[block] += 1

    def retain(self, block: int) -> None:
        """The content of this used block is worth keeping once nobody holds it."""
        assert self._ref_counts[block] > 0, f"block {block} is not in use"
        self._retained.add(block)

    def discard(self, block: int) -> None:
        """The content of this block, which was to be kept, is of no worth after all."""
        self._retained.remove(block)
        if self._ref_counts[block] == 0:
            self._free(block)

    def retained(self) -> set[int]:
        """All blocks whose content is to be kept."""
        return set(self._retained)

    def release(self, blocks: Sequence[int]) -> None:
        """One reference less for each block of a table.

        Goes backwards, so that a table's tail is evicted before its head: the prefix that
        most requests share lives longest.
        """
        for block in reversed(blocks):
            count = self._ref_counts[block] - 1
            assert count >= 0, f"block {block} released too often"
            self._ref_counts[block] = count
            if count == 0:
                if block in self._retained:
                    self._cached[block] = None
                    self._runs.move(block, State.USED, State.CACHED)
                else:
                    self._num_free += 1
                    self._runs.move(block, State.USED, State.FREE)

    def check_integrity(self) -> None:
        """Raises AssertionError unless each block is in exactly one state."""
        cached = set(self._cached)
        used = {block for block, count in enumerate(self._ref_counts) if count}
        assert self._num_free + len(cached) + len(used) == self.num_blocks, "a block has no state"
        assert not cached & used
        assert cached <= self._retained <= cached | used, "content of a free block was to be kept"
        assert min(self._ref_counts, default=0) >= 0
        self._runs.check_integrity([self._state(block) for block in range(self.num_blocks)])

    def _state(self, block: int) -> State:
        if self._is_free(block):
            return State.FREE
        return State.USED if self._ref_counts[block] else State.CACHED
