"""KV blocks by number: who holds each, which are empty, which may be taken from the prefix cache.

Counts references only; it does not know what a block holds (prefix_cache.py) or whose it is
(kv_cache_manager.py).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence


class BlockPool:
    """Blocks 0 .. num_blocks - 1. A block is in exactly one of three states:

    used    ref_count >= 1
    cached  ref_count 0, its content is wanted: taken when nothing is empty, longest unused first
    free    ref_count 0, content of no worth
    """

    def __init__(self, num_blocks: int, on_evict: Callable[[int], None]) -> None:
        """`on_evict(block)` is told of each cached block that is taken for something else."""
        self._ref_counts = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: low numbers go first
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._retained: set[int] = set()  # blocks that become cached, not free, when released
        self._on_evict = on_evict

    @property
    def num_blocks(self) -> int:
        return len(self._ref_counts)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can give."""
        return len(self._free) + len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_available

    def ref_count(self, block: int) -> int:
        return self._ref_counts[block]

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks with one reference each; None, and nothing done, if there are too few."""
        if count > self.num_available:
            return None
        blocks = []
        for _ in range(count):
            block = self._free.pop() if self._free else self._evict()
            self._ref_counts[block] = 1
            blocks.append(block)
        return blocks

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        self._retained.remove(block)
        self._on_evict(block)
        return block

    def share(self, block: int) -> None:
        """One more reference to a used or cached block."""
        if self._ref_counts[block] == 0:
            del self._cached[block]  # KeyError: the block is free, its content is gone
        self._ref_counts[block] += 1

    def retain(self, block: int) -> None:
        """The content of this used block is worth keeping once nobody holds it."""
        assert self._ref_counts[block] > 0, f"block {block} is not in use"
        self._retained.add(block)

    def discard(self, block: int) -> None:
        """The content of this block, which was to be kept, is of no worth after all."""
        self._retained.remove(block)
        if self._ref_counts[block] == 0:
            del self._cached[block]
            self._free.append(block)

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
                else:
                    self._free.append(block)

    def check_integrity(self) -> None:
        """Raises AssertionError unless each block is in exactly one state."""
        free, cached = set(self._free), set(self._cached)
        used = {block for block, count in enumerate(self._ref_counts) if count}
        assert len(free) == len(self._free), "a block is free twice"
        assert len(free) + len(cached) + len(used) == self.num_blocks, "a block has no state"
        assert not free & cached and not free & used and not cached & used
        assert cached <= self._retained, "a cached block holds nothing"
        assert not free & self._retained, "a free block was to be kept"
        assert min(self._ref_counts, default=0) >= 0
