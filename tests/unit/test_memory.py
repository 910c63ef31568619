"""Memory that was freed goes back to the system."""

from __future__ import annotations

import ctypes

import psutil
import pytest

from headgate.shard.memory import give_back

_PIECE, _PIECES = 1 << 10, 60_000


def test_what_was_freed_goes_back_to_the_system() -> None:
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        pytest.skip("no glibc")
    libc.malloc.restype = ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    resident = psutil.Process().memory_info
    pieces = [libc.malloc(_PIECE) for _ in range(_PIECES)]
    for piece in pieces:
        ctypes.memset(piece, 1, _PIECE)
    for piece in pieces[:-1]:  # the last one holds the end of the heap
        libc.free(piece)
    before = resident().rss
    give_back()
    assert before - resident().rss > _PIECE * _PIECES * 0.8
    libc.free(pieces[-1])
