"""How operations reach the C++: `call` runs a function, and tells the recording under way, if any.

An operation that takes its results' memory from `allocate` and makes all its calls by `call` can be
recorded (see recording.py) without knowing it. Recordings are the calling thread's own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from headgate.kernels.cpu import library

if TYPE_CHECKING:
    from headgate.kernels.cpu.recording import Recording

Failure = Callable[[int], Exception]  # of a function's status, which is not 0


class _Current(threading.local):
    recording: Recording | None = None


current = _Current()


def out_of_memory(status: int) -> Exception:
    return MemoryError("no memory for the temporary data of an operation")


def call(name: str, *arguments: int | float | None, failure: Failure = out_of_memory) -> None:
    """Calls function `name` of the library; pointers are addresses, None is a null pointer.

    Raises what `failure` makes of the status, where the function returns one that is not 0.
    """
    loaded = library.load()
    assert loaded is not None, "asked for without available()"
    status = getattr(loaded, name)(*arguments)
    if status:
        raise failure(status)
    if current.recording is not None:
        current.recording.note(name, arguments, failure)


def allocate(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Memory for a result that `call` will fill."""
    if current.recording is None:
        return torch.empty(shape, dtype=dtype)
    return current.recording.allocate(shape, dtype)
