"""Memory for packed weights, in huge pages where the system gives them.

A step reads every weight once, from memory. With pages of 4 KB a core looks up an address for each
of them and its prefetcher stops at their ends: products with few rows then reach two thirds of what
memory can do (docs/performance.md). Matrices are cut from large mappings, because most are smaller
than a huge page.
"""

from __future__ import annotations

import contextlib
import mmap
import threading

import torch

_ALIGNMENT = 64  # bytes: a panel never shares a cache line
_MAPPING = 64 << 20  # bytes; what is not used of a mapping takes no memory


class _Mapping:
    """The mapping that matrices are being cut from. Tensors keep theirs alive."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._memory: mmap.mmap | None = None
        self._used = 0

    def take(self, nbytes: int) -> torch.Tensor:
        with self._lock:
            if self._memory is None or self._used + nbytes > len(self._memory):
                self._memory, self._used = _map(max(nbytes, _MAPPING)), 0
            part = torch.frombuffer(
                self._memory, dtype=torch.uint8, count=nbytes, offset=self._used
            )
            self._used += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
            return part


def _map(nbytes: int) -> mmap.mmap:
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # Without them (another system, or one that has them turned off) pages are small.
    with contextlib.suppress(AttributeError, OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


_mapping = _Mapping()


def allocate(nbytes: int) -> torch.Tensor:
    """uint8[nbytes] of zeros, at least one, aligned to cache lines."""
    return _mapping.take(nbytes)
