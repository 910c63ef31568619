"""Places for buffers whose lifetimes are known: buffers that never live together share memory.

Greedy by size: the largest first, each at the lowest place free during its whole life (Pisarchyk
and Lee, "Efficient Memory Management for Deep Neural Net Inference", 2020; TurboTransformers plans
by the same knowledge).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_ALIGNMENT = 64  # bytes: no two buffers share a cache line


@dataclass(frozen=True, slots=True)
class Lifetime:
    """A buffer of `size` bytes that calls `first` to `last`, both included, read or write."""

    size: int
    first: int
    last: int


def plan_memory(buffers: Sequence[Lifetime]) -> tuple[list[int], int]:
    """(each buffer's offset, the bytes they take together)."""
    offsets = [0] * len(buffers)
    placed: list[int] = []
    total = 0
    for index in sorted(range(len(buffers)), key=lambda i: (-buffers[i].size, i)):
        buffer = buffers[index]
        neighbours = sorted(
            (offsets[other], offsets[other] + buffers[other].size)
            for other in placed
            if buffers[other].first <= buffer.last and buffer.first <= buffers[other].last
        )
        offset = 0
        for start, end in neighbours:
            if offset + buffer.size <= start:
                break
            offset = max(offset, -(-end // _ALIGNMENT) * _ALIGNMENT)
        offsets[index] = offset
        placed.append(index)
        total = max(total, offset + buffer.size)
    return offsets, total
