"""Memory of the system's zeros in huge pages, where it gives them.

What a step reads once, from memory, is read faster so: with pages of 4 KB a core looks up an
address for each of them, and its prefetcher stops at their ends (docs/performance.md).
"""

from __future__ import annotations

import contextlib
import mmap


def map_zeros(nbytes: int) -> mmap.mmap:
    """Private memory that takes none of the machine's until it is written, then a page at a time.

    Raises OSError or OverflowError where there is not as much.
    """
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # Without them (another system, or one that has them turned off) pages are small.
    with contextlib.suppress(AttributeError, OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
