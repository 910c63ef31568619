"""A GPU that is not there: memory of the host, graphs that compute when replayed, and a count of
what the host does meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from headgate.shard.device import DeviceMemory

# What would make the host wait for a GPU's tensor.
SYNCHRONISING = frozenset(
    {"item", "tolist", "cpu", "to", "nonzero", "unique", "equal", "allclose", "masked_select"}
    | {"__bool__", "__int__", "__float__", "__index__", "__array__", "__contains__"}
)


class FakeDevice:
    """Copies to the host arrive when they are waited for."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.waits = 0
        self.host: list[torch.Tensor] = []  # pinned
        # Bytes that `memory` tells of; a graph takes some.
        self.total, self.free, self.reserved, self.peak, self.graph_bytes = (
            1 << 34,
            1 << 34,
            0,
            0,
            0,
        )

    def zeros(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        self.calls.append("zeros")
        return torch.zeros(shape, dtype=dtype)

    def pinned(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        self.calls.append("pinned")
        self.host.append(torch.zeros(shape, dtype=dtype))
        return self.host[-1]

    def upload(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self.calls.append("upload")
        target.copy_(source)

    def download(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Callable[[], None]:
        self.calls.append("download")
        copies = [(target, source.clone()) for target, source in pairs]

        def wait() -> None:
            if copies:
                self.waits += 1
            with torch.inference_mode():
                while copies:
                    target, source = copies.pop()
                    target.copy_(source)

        for target, _ in pairs:  # to be seen by whoever does not wait
            target.fill_(77)
        return wait

    def capture(self, run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        self.calls.append("capture")
        self.free -= self.graph_bytes
        result = run()

        def replay() -> None:
            self.calls.append("replay")
            with Unwatched():
                result.copy_(run())

        return replay, result

    def memory(self) -> DeviceMemory:
        return DeviceMemory(self.total, self.free, self.reserved, self.peak)

    def forget_peak(self) -> None:
        self.calls.append("forget_peak")


class Unwatched:
    """What happens in here is the device's doing."""

    depth = 0

    def __enter__(self) -> None:
        Unwatched.depth += 1

    def __exit__(self, *_: object) -> None:
        Unwatched.depth -= 1


class Watch(TorchDispatchMode):
    """Notes PyTorch's operations, but for the device's own."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.allocated: list[int] = []  # bytes of each new tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not Unwatched.depth:
            self.names.add(func.name())
            known = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
            for tensor in result if isinstance(result, (list, tuple)) else [result]:
                if not isinstance(tensor, torch.Tensor) or not tensor.numel():
                    continue
                if tensor.untyped_storage().data_ptr() not in known:
                    self.allocated.append(tensor.untyped_storage().nbytes())
        return result


class Waits(TorchFunctionMode):
    """Notes calls that would make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        moves = any(isinstance(x, (str, torch.device)) for x in args) or "device" in (kwargs or {})
        if name in SYNCHRONISING and (name != "to" or moves) and not Unwatched.depth:
            self.found.append(name)
        return func(*args, **(kwargs or {}))
