"""Lack of memory, for which PyTorch has no one exception; what was freed, back to the system."""

from __future__ import annotations

import ctypes

import torch

_CPU_ALLOCATOR = ("DefaultCPUAllocator", "not enough memory", "can't allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, in Python, on a GPU or in PyTorch's CPU allocator."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _CPU_ALLOCATOR)


def give_back() -> None:
    """Gives the system the pages that C's allocator keeps of what was freed.

    It keeps those of a thread's small pieces for the next ones: after loading a model more than
    100 MB, which steps would never ask for again. Does nothing where there is no glibc.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))
