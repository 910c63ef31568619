"""Shards that are threads of one process, and share memory all the same."""

from __future__ import annotations

import mmap
import os

from headgate.shard.distributed import SharedMemoryGroup
from headgate.shard.shared_memory import SharedMemory

_SLOT = 1 << 17


def groups_of_threads(world_size: int) -> list[SharedMemoryGroup]:
    """One for each thread. The C++ kernels must be built."""
    mapping = mmap.mmap(-1, 4096 + 2 * world_size * _SLOT)
    ids = [os.getpid()] * world_size
    return [
        SharedMemoryGroup(rank, world_size, SharedMemory(rank, mapping, _SLOT, ids, timeout=20))
        for rank in range(world_size)
    ]
