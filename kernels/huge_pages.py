"""Memory of the system's zeros in huge pages, where it gives them.

What a step reads once, from memory, is read faster so: with pages of 4 KB a core looks up an
address for each of them, and its prefetcher stops at their ends (docs/performance-history.md).
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys

HUGE_PAGE = 2 << 20  # bytes
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, which Python has no name for


def map_zeros(nbytes: int) -> mmap.mmap:
    """Private memory that takes none of the machine's until it is written, then a page at a time.

    Raises OSError or OverflowError where there is not as much.
    """
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # Without them (another system, or one that has them turned off) pages are small.
    with contextlib.suppress(AttributeError, OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def take_pages(address: int, nbytes: int) -> bool:
    """Has the system give the pages of a range of `map_zeros` now, as writing to each would.

    False where it does not: it has too little memory, or does not know how (Linux before 5.14).
    """
    if sys.platform != "linux":
        return False
    start = address - address % mmap.PAGESIZE
    size = ctypes.c_size_t(address + nbytes - start)
    # Without the GIL, unlike mmap's own madvise.
    return ctypes.CDLL(None).madvise(ctypes.c_void_p(start), size, _POPULATE_WRITE) == 0
