"""Recording: notes the calls that a piece of a model makes into the C++, while it runs.

Several recordings of a piece at different sizes make a Program (program.py), which does the same
without the interpreter. That only works if everything the piece does goes through `calls.call`;
what torch computes in between is noticed and named in `obstacle`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from enum import Enum
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from headgate.kernels.cpu import calls


class NotRecordable(Exception):
    """Why something can't be replayed, as half a sentence."""


class RecordedCall(NamedTuple):
    """A call as it was made; pointers are addresses."""

    name: str
    arguments: tuple[int | float, ...]
    failure: calls.Failure


class Kind(Enum):
    """What an address points into."""

    BUFFER = "a buffer of the recording"
    EXTERNAL = "memory that may be elsewhere when the calls are replayed"
    PLAIN = "memory that stays where it is, or no memory: a number"


class Place(NamedTuple):
    """An address as an offset in what it points into; of plain memory the address itself."""

    kind: Kind
    target: int  # which buffer, or which external
    offset: int


class Recording:
    """Records within its `with` block, on the thread that runs it. Keeps all buffers alive, so that
    an address means one buffer only."""

    def __init__(self, sizes: Sequence[int], externals: Sequence[torch.Tensor] = ()) -> None:
        """`sizes`: what the block runs with, such as the numbers of tokens and rows. `externals`:
        tensors that calls get from outside and that may lie elsewhere later."""
        self.sizes = tuple(sizes)
        self.calls: list[RecordedCall] = []
        self.buffers: list[torch.Tensor] = []
        self.obstacle = ""
        self._watch = _TorchWatch(self)
        self._starts: list[tuple[int, int]] = []  # (address, buffer), in order
        self._externals = {tensor.data_ptr(): i for i, tensor in enumerate(externals)}

    def __enter__(self) -> Recording:
        assert calls.current.recording is None, "recordings don't nest"
        calls.current.recording = self
        self._watch.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._watch.__exit__(kind, error, traceback)
        calls.current.recording = None

    def note(
        self, name: str, arguments: Sequence[int | float | None], failure: calls.Failure
    ) -> None:
        """Takes down a call that was just made."""
        plain = tuple(0 if argument is None else argument for argument in arguments)
        self.calls.append(RecordedCall(name, plain, failure))

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A new buffer."""
        buffer = torch.empty(shape, dtype=dtype)
        self.buffers.append(buffer)
        self._starts.clear()
        return buffer

    def place(self, address: int) -> Place:
        """What an address points into."""
        if not self._starts:
            self._starts = sorted((b.data_ptr(), index) for index, b in enumerate(self.buffers))
        at = bisect_right(self._starts, (address, len(self.buffers))) - 1
        if at >= 0:
            start, index = self._starts[at]
            if address < start + self.buffers[index].nbytes:
                return Place(Kind.BUFFER, index, address - start)
        if address in self._externals:
            return Place(Kind.EXTERNAL, self._externals[address], 0)
        return Place(Kind.PLAIN, 0, address)


class _TorchWatch(TorchDispatchMode):
    """Lets torch make views and empty tensors; anything else would be missing in a replay."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self._recording = recording

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False, or torch would import its whole compiler (seconds) to keep it away from here."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._recording.obstacle and not _is_harmless(func, args, result):
            self._recording.obstacle = f"it calls {func} of torch"
        return result


def _is_harmless(func: Any, args: Any, result: Any) -> bool:
    name = str(func)
    if name.startswith("aten.empty."):
        return True
    # A detached tensor is on its way to NumPy, where nobody watches it.
    if func._schema.is_mutable or name.startswith("aten.detach"):
        return False
    results = result if isinstance(result, (tuple, list)) else [result]
    given = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, torch.Tensor)}
    return all(
        isinstance(part, torch.Tensor) and part.untyped_storage().data_ptr() in given
        for part in results
    )
