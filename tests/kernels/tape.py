"""Tape: calls into the C++ kernels with all their memory, in a file that play_tape.cpp plays, so
that they can be made on another kind of machine."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from pathlib import Path

import torch

from headgate.kernels.cpu import library
from headgate.kernels.cpu.recording import RecordedCall, Recording


class Tape:
    """Regions of memory, and calls whose pointers lead into them."""

    def __init__(self) -> None:
        self.calls: list[RecordedCall] = []
        self._regions: list[tuple[int, bytes]] = []  # address, and what is there at the start
        self._buffers: list[torch.Tensor] = []  # kept, so that an address means one region only

    def hold(self, *tensors: torch.Tensor) -> None:
        """Memory of calls, with what it holds now. Must stay where it is until `write`."""
        for tensor in tensors:
            content = bytes(tensor.untyped_storage())
            self._regions.append((tensor.untyped_storage().data_ptr(), content))

    def hold_blank(self, address: int, size: int) -> None:
        """Memory that calls fill."""
        self._regions.append((address, b"\xff" * size))

    def add(self, recording: Recording) -> None:
        """A recording's calls and buffers."""
        self.calls += recording.calls
        self._buffers += recording.buffers
        for buffer in recording.buffers:
            self.hold_blank(buffer.data_ptr(), buffer.nbytes)

    def write(self, path: Path) -> None:
        words = [len(self._regions), *(len(content) for _, content in self._regions)]
        parts = [struct.pack(f"<{len(words) + 1}q", *words, len(self.calls))]
        parts += [self._describe(call) for call in self.calls]
        path.write_bytes(b"".join([*parts, *(content for _, content in self._regions)]))

    def read(self, path: Path) -> list[bytes]:
        """What the regions hold at the end, of a file that play_tape wrote."""
        content, at, found = path.read_bytes(), 0, []
        for _, before in self._regions:
            found.append(content[at : at + len(before)])
            at += len(before)
        assert at == len(content)
        return found

    def region_of(self, address: int) -> int:
        """Which region begins there."""
        return next(i for i, (start, _) in enumerate(self._regions) if start == address)

    def _describe(self, call: RecordedCall) -> bytes:
        result, types = library.SIGNATURES[call.name]
        integers: list[tuple[int, int]] = []
        floats: list[tuple[int, int]] = []
        for kind, value in zip(types, call.arguments, strict=True):
            if kind in library.FLOATS:
                bits = struct.pack("<f4x" if kind is ctypes.c_float else "<d", value)
                floats.append((-1, int.from_bytes(bits, "little", signed=True)))
            else:
                place = self._place(int(value)) if kind is ctypes.c_void_p else (-1, int(value))
                integers.append(place)
        words: Sequence[int] = [len(integers), len(floats), int(result is not None)]
        words = [*words, *(word for argument in integers + floats for word in argument)]
        return struct.pack(f"<32s{len(words)}q", call.name.encode(), *words)

    def _place(self, address: int) -> tuple[int, int]:
        if address == 0:
            return -1, 0
        for index, (start, content) in enumerate(self._regions):
            if start <= address < start + len(content):
                return index, address - start
        raise AssertionError(f"no region holds {address:#x}")
