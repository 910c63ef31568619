"""Staging: arrays on their way to the device, and results on their way back, in pinned memory.

Copies out of pinned memory go on while the host does something else; until they are done the host
must leave the memory alone. So there is memory for two steps, in turn: when a step begins, the one
before may still be under way, and the one before that has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from headgate.shard.device import Device

AnyArray = npt.NDArray[Any]

_FIRST_BYTES = 256 << 10  # doubled when a step needs more
_ALIGNMENT = 16  # bytes, as kernels' widest loads want

_DTYPES: dict[torch.dtype, np.dtype[Any]] = {
    torch.int64: np.dtype(np.int64),
    torch.int32: np.dtype(np.int32),
    torch.float32: np.dtype(np.float32),
}
_TORCH_DTYPES = {numpy: tensor for tensor, numpy in _DTYPES.items()}


class _Arena:
    """Pinned memory that is taken piece by piece."""

    def __init__(self, device: Device, num_bytes: int) -> None:
        self.tensor = device.pinned(num_bytes, dtype=torch.uint8)
        self._array = self.tensor.numpy()
        self.used = 0

    def holds(self, num_bytes: int) -> bool:
        return self.used + num_bytes <= len(self._array)

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[int, AnyArray]:
        """(where it begins, the next free piece as an array)."""
        start, size = self.used, int(np.prod(shape)) * dtype.itemsize
        self.used += aligned(size)
        return start, self._array[start : start + size].view(dtype).reshape(shape)


class Staging:
    """Called from the model's thread, but for what `download` returns."""

    def __init__(self, device: Device, num_bytes: int = _FIRST_BYTES) -> None:
        self._device = device
        self.turn = 0  # which of two buffers this step may write
        self._up = [_Arena(device, num_bytes) for _ in range(2)]
        self._down = [_Arena(device, num_bytes) for _ in range(2)]
        # One for both: the device reads a step's inputs before it gets the next step's.
        self._memory = device.zeros(num_bytes, dtype=torch.uint8)

    def begin(self) -> None:
        """A step begins; the last but one has ended."""
        self.turn = 1 - self.turn
        self._up[self.turn].used = self._down[self.turn].used = 0

    def upload(self, arrays: Sequence[AnyArray]) -> list[torch.Tensor]:
        """The arrays on the device, by one asynchronous copy; theirs until the next `begin`.

        int64, int32 and float32.
        """
        arena = self._room(self._up, sum(aligned(array.nbytes) for array in arrays))
        if len(self._memory) < len(arena.tensor):
            self._memory = self._device.zeros(len(arena.tensor), dtype=torch.uint8)
        first, tensors = arena.used, []
        for array in arrays:
            start, place = arena.take(array.shape, array.dtype)
            place[...] = array
            piece = self._memory[start : start + array.nbytes]
            tensors.append(piece.view(_TORCH_DTYPES[array.dtype]).view(array.shape))
        if arena.used > first:
            used = slice(first, arena.used)
            self._device.upload(self._memory[used], arena.tensor[used])
        return tensors

    def download(self, tensors: Sequence[torch.Tensor]) -> Callable[[], list[AnyArray]]:
        """Begins copying to the host; what it returns waits for that, and for the step to end.

        The arrays hold until the next step but one begins.
        """
        arena = self._room(
            self._down, sum(aligned(tensor.numel() * tensor.itemsize) for tensor in tensors)
        )
        arrays, pairs = [], []
        for tensor in tensors:
            start, array = arena.take(tuple(tensor.shape), _DTYPES[tensor.dtype])
            target = arena.tensor[start : start + array.nbytes]
            arrays.append(array)
            pairs.append((target.view(tensor.dtype).view(tensor.shape), tensor))
        wait = self._device.download(pairs)

        def fetched() -> list[AnyArray]:
            wait()
            return arrays

        return fetched

    def _room(self, arenas: list[_Arena], num_bytes: int) -> _Arena:
        """This step's arena; a larger one where it is too full."""
        arena = arenas[self.turn]
        if not arena.holds(num_bytes):
            # The old one is kept until its copies are done by whoever allocates pinned memory.
            size = max(2 * len(arena.tensor), aligned(num_bytes))
            arena = arenas[self.turn] = _Arena(self._device, size)
        return arena


def aligned(num_bytes: int) -> int:
    """Bytes that a piece takes with what follows it."""
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
