"""Program: what several recordings of a piece of a model have in common, replayed by one C++ call.

The recordings ran at sizes (numbers of tokens, of rows) that differ from the first's in one place
each, so every argument that follows a size shows by how much: arguments become constants plus
multiples of sizes, and one program serves all sizes up to the largest. Buffers are planned for that
one; those that never live together share memory, and a replay allocates nothing.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from headgate.kernels.cpu import library
from headgate.kernels.cpu.memory_plan import Lifetime, plan_memory
from headgate.kernels.cpu.recording import Kind, NotRecordable, Place, Recording


@dataclass(frozen=True, slots=True)
class Linear:
    """A number that follows the sizes: base + the sum of factor * size."""

    base: int
    factors: tuple[int, ...]

    def at(self, sizes: Sequence[int]) -> int:
        return self.base + sum(f * s for f, s in zip(self.factors, sizes, strict=True))


@dataclass(frozen=True, slots=True)
class Argument:
    """An argument of a call; an offset where it points into a buffer or an external."""

    kind: Kind
    target: int  # which buffer, or which external
    value: Linear


class Program:
    """Calls on planned buffers. `outputs`: the results' memory, for the largest sizes."""

    def __init__(
        self,
        recordings: Sequence[Recording],
        results: Sequence[Sequence[torch.Tensor]],
        largest: Sequence[int],
    ) -> None:
        """`recordings[0]`, and then one for each size, which was larger by 1 there.

        `results`: what each recording came to, contiguous tensors. Raises NotRecordable.
        """
        _check_alike(recordings)
        self.calls = recordings[0].calls
        arguments = [_solve_call(recordings, index) for index in range(len(self.calls))]
        alike = list(zip(*results, strict=True))  # by result, in the order of the recordings
        places = [_solve_result(recordings, tensors) for tensors in alike]
        self.lifetimes = _lifetimes(recordings, arguments, places, largest)
        self.offsets, self.planned_bytes = plan_memory(self.lifetimes)
        self._arena = torch.empty(self.planned_bytes, dtype=torch.uint8)
        self._num_sizes = len(largest)
        self._sizes: tuple[int, ...] = ()  # that `_values` are for
        self._size_words = (ctypes.c_int64 * len(largest))()
        self._failed = ctypes.c_int64()
        self._nanoseconds: np.ndarray | None = None
        self._externals: list[tuple[int, int, int]] = []  # (row of the table, which, offset)
        self._table = self._lay_out_arguments(arguments)
        self._values = self._table[:, 0].copy()  # of the arguments
        self._places = np.flatnonzero(self._table[:, 1:].any(axis=1))  # of those that follow sizes
        self._following = self._table[self._places]
        self._call_table = self._lay_out_calls(arguments)
        self.outputs = [
            self._memory(place, tensors[0].dtype, _solve_shape(recordings, tensors, largest))
            for place, tensors in zip(places, alike, strict=True)
        ]
        # Looked up once: a replay of few tokens takes little longer than finding them again.
        self._replay = _library().hg_replay
        self._work_out = _library_keeping_gil().hg_replay_arguments
        self._work_out_from = (
            self._following.ctypes.data,
            self._places.ctypes.data,
            len(self._places),
            self._size_words,
            self._num_sizes,
            self._values.ctypes.data,
        )
        self._before = (
            self._call_table.ctypes.data,
            len(self.calls),
            self._values.ctypes.data,
        )
        self._failed_at = ctypes.addressof(self._failed)
        self._times_at: int | None = None

    @property
    def buffer_bytes(self) -> int:
        """What the buffers would take if none shared memory, at the largest sizes."""
        return sum(lifetime.size for lifetime in self.lifetimes)

    def bind(self, externals: Sequence[int]) -> None:
        """Says where the externals are from now on, by address."""
        for row, which, offset in self._externals:
            self._table[row, 0] = self._values[row] = externals[which] + offset

    def run(self, sizes: tuple[int, ...], beats: int) -> None:
        """Makes all calls; `beats`: the address of an int64 that counts them."""
        if sizes != self._sizes:  # a step that decodes is often like the one before
            self._sizes = sizes
            self._size_words[:] = list(sizes)
            self._work_out(*self._work_out_from)
        status = self._replay(*self._before, beats, self._failed_at, self._times_at)
        if status:
            raise self.calls[self._failed.value].failure(status)

    def time_calls(self) -> np.ndarray:
        """From now on each call's nanoseconds are added up, in the array returned: int64[calls]."""
        self._nanoseconds = np.zeros(len(self.calls), np.int64)
        self._times_at = self._nanoseconds.ctypes.data
        return self._nanoseconds

    def arguments(self, call: int, sizes: Sequence[int]) -> list[int]:
        """A call's integer and pointer arguments at these sizes."""
        first, integers = self._call_table[call, 1:3]
        rows = self._table[first : first + integers]
        return (rows[:, 0] + rows[:, 1:] @ np.array(sizes, np.int64)).tolist()

    # ------------------------------------------------------------------ laying out

    def _memory(self, place: Argument, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
        start = self.offsets[place.target] + place.value.base
        size = torch.Size(shape).numel() * dtype.itemsize
        return self._arena[start : start + size].view(dtype).view(*shape)

    def _lay_out_arguments(self, calls: Sequence[Sequence[Argument]]) -> np.ndarray:
        flat = [argument for arguments in calls for argument in arguments]
        table = np.zeros((len(flat), 1 + self._num_sizes), np.int64)
        start = self._arena.data_ptr()
        for row, argument in enumerate(flat):
            base = argument.value.base
            if argument.kind is Kind.BUFFER:
                base += start + self.offsets[argument.target]
            elif argument.kind is Kind.EXTERNAL:
                self._externals.append((row, argument.target, base))
            table[row] = (base, *argument.value.factors)
        return table

    def _lay_out_calls(self, calls: Sequence[Sequence[Argument]]) -> np.ndarray:
        """As replay.cpp's Call."""
        table = np.zeros((len(calls), 5), np.int64)
        loaded, first = _library(), 0
        for index, arguments in enumerate(calls):
            name = self.calls[index].name
            function = ctypes.cast(getattr(loaded, name), ctypes.c_void_p).value or 0
            result, types = library.SIGNATURES[name]
            floats = sum(kind in library.FLOATS for kind in types)
            integers = len(arguments) - floats
            table[index] = (function, first, integers, floats, int(result is not None))
            first += len(arguments)
            if integers > loaded.hg_replay_most_integers():
                raise NotRecordable(f"{name} has too many arguments, or this machine replays none")
            if floats > loaded.hg_replay_most_floats():
                raise NotRecordable(f"{name} has too many arguments")
        return table


def _library() -> ctypes.CDLL:
    loaded = library.load()
    assert loaded is not None, "asked for without available()"
    return loaded


def _library_keeping_gil() -> ctypes.PyDLL:
    loaded = library.load_keeping_gil()
    assert loaded is not None, "asked for without available()"
    return loaded


def _check_alike(recordings: Sequence[Recording]) -> None:
    first = recordings[0]
    for recording in recordings:
        if recording.obstacle:
            raise NotRecordable(recording.obstacle)
        if [call.name for call in recording.calls] != [call.name for call in first.calls]:
            raise NotRecordable("the calls it makes depend on the number of tokens or rows")
        if len(recording.buffers) != len(first.buffers):
            raise NotRecordable("the buffers it takes depend on the number of tokens or rows")


def _solve(values: Sequence[int], recordings: Sequence[Recording], what: str) -> Linear:
    """The number that had these values in the recordings."""
    factors = tuple(value - values[0] for value in values[1:])
    if not any(factors):  # as most are
        return Linear(values[0], factors)
    base = values[0] - sum(f * s for f, s in zip(factors, recordings[0].sizes, strict=True))
    found = Linear(base, factors)
    if any(found.at(r.sizes) != v for r, v in zip(recordings, values, strict=True)):
        raise NotRecordable(f"{what} does not follow the number of tokens or rows")
    return found


def _solve_place(recordings: Sequence[Recording], places: Sequence[Place], what: str) -> Argument:
    kind, target = places[0].kind, places[0].target
    if any((place.kind, place.target) != (kind, target) for place in places):
        raise NotRecordable(f"{what} is in other memory each time")
    value = _solve([place.offset for place in places], recordings, what)
    if any(value.factors):
        raise NotRecordable(f"{what} is at another place each time")
    return Argument(kind, target, value)


def _solve_result(recordings: Sequence[Recording], results: Sequence[torch.Tensor]) -> Argument:
    """Where a result is: in a buffer."""
    if not all(result.is_contiguous() for result in results):
        raise NotRecordable("its results are not all contiguous tensors")
    places = [r.place(o.data_ptr()) for r, o in zip(recordings, results, strict=True)]
    found = _solve_place(recordings, places, "its result")
    if found.kind is not Kind.BUFFER:
        raise NotRecordable("its result is not in memory of its own")
    return found


def _solve_shape(
    recordings: Sequence[Recording], results: Sequence[torch.Tensor], largest: Sequence[int]
) -> list[int]:
    return [
        _solve([result.shape[dim] for result in results], recordings, "its shape").at(largest)
        for dim in range(results[0].dim())
    ]


def _solve_call(recordings: Sequence[Recording], index: int) -> list[Argument]:
    """A call's arguments, integers and pointers first, then floats."""
    name = recordings[0].calls[index].name
    integers: list[Argument] = []
    floats: list[Argument] = []
    for number, kind in enumerate(library.SIGNATURES[name][1]):
        values = [recording.calls[index].arguments[number] for recording in recordings]
        what = f"argument {number + 1} of {name}"
        if kind in library.FLOATS:
            if any(value != values[0] for value in values):
                raise NotRecordable(f"{what} depends on the number of tokens or rows")
            bits = struct.pack("<f4x" if kind is ctypes.c_float else "<d", values[0])
            word = int.from_bytes(bits, "little", signed=True)
            floats.append(Argument(Kind.PLAIN, 0, Linear(word, (0,) * len(recordings[0].sizes))))
        elif kind is ctypes.c_void_p:
            places = [r.place(int(v)) for r, v in zip(recordings, values, strict=True)]
            integers.append(_solve_place(recordings, places, what))
        else:
            value = _solve([int(value) for value in values], recordings, what)
            integers.append(Argument(Kind.PLAIN, 0, value))
    return integers + floats


def _lifetimes(
    recordings: Sequence[Recording],
    calls: Sequence[Sequence[Argument]],
    results: Sequence[Argument],
    largest: Sequence[int],
) -> list[Lifetime]:
    """Buffers live from the first call that is given them to the last, the results' to the end."""
    used: dict[int, list[int]] = {}
    for number, arguments in enumerate(calls):
        for argument in arguments:
            if argument.kind is Kind.BUFFER:
                used.setdefault(argument.target, []).append(number)
    for result in results:
        used.setdefault(result.target, []).append(len(calls))
    lifetimes = []
    for index in range(len(recordings[0].buffers)):
        sizes = [recording.buffers[index].nbytes for recording in recordings]
        size = _solve(sizes, recordings, "a buffer's size").at(largest)
        numbers = used.get(index, [])
        # A buffer that no call is given needs no memory.
        lifetimes.append(Lifetime(size, numbers[0], numbers[-1]) if numbers else Lifetime(0, 0, 0))
    return lifetimes
