"""Memory for packed weights, in huge pages where the system gives them.

With small ones products with few rows reach two thirds of what memory can do. Matrices are cut from
large mappings, because most are smaller than a huge page.
"""

from __future__ import annotations

import mmap
import threading

import torch

from headgate.kernels.huge_pages import map_zeros

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
                self._memory, self._used = map_zeros(max(nbytes, _MAPPING)), 0
            part = torch.frombuffer(self._memory, dtype=torch.uint8)[self._used :][:nbytes]
            self._used += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
            return part


_mapping = _Mapping()


def allocate(nbytes: int) -> torch.Tensor:
    """uint8[nbytes] of zeros, aligned to cache lines."""
    return _mapping.take(nbytes)
