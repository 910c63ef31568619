"""The CPU back end: operations in C++, compiled at set-up, chosen by instruction set at run time.

Every operation gives a row the same bits whatever else is in the batch, however its prompt was
chunked and on any number of threads; the instruction sets with fused multiply-add agree with each
other too, but for norms and softmax sums, which follow the vectors' width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from headgate.kernels.cpu import library
from headgate.kernels.cpu.operations import OPS

__all__ = ["BATCH_INVARIANT", "OPS", "available", "can_record", "set_num_threads"]

BATCH_INVARIANT: dict[str, Callable[..., Any]] = {}  # OPS are so already


def available() -> bool:
    """Whether the C++ is compiled, or can be now, and runs here. The first call compiles it if need
    be (seconds), and takes torch's number of threads."""
    loaded = library.load()
    if loaded is not None and loaded.hg_num_threads() == 1:
        set_num_threads(torch.get_num_threads())
    return loaded is not None


def can_record() -> bool:
    """Whether calls can be recorded and replayed (program.py) on this machine."""
    loaded = library.load()
    return loaded is not None and loaded.hg_replay_most_integers() > 0


def set_num_threads(count: int) -> None:
    """Threads that share each operation, the caller's own included; idle ones sleep."""
    loaded = library.load()
    if loaded is not None:
        loaded.hg_set_num_threads(count)
