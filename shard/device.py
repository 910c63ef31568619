"""Device: every call to CUDA that a shard's steps make, so that they are few and can be counted.

Tests put another in its place. Choosing a GPU when the process starts is here, too.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes of the device's memory."""

    total: int
    free: int  # that nobody has
    reserved: int  # by this process's allocator
    peak: int  # most that this process's tensors took since `forget_peak`


class Device(Protocol):
    """What steps need of CUDA."""

    def zeros(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory of the device."""

    def pinned(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory of the host that the device can read and write by itself."""

    def upload(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copies from pinned memory, after all work begun so far; returns before it is done."""

    def download(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Callable[[], None]:
        """Copies each (target in pinned memory, source) once all work begun so far has ended,
        beside the work to come; what it returns waits until that is done, on any thread."""

    def capture(self, run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        """(replays what `run` does, its result's place). Computes it once, too."""

    def memory(self) -> DeviceMemory:
        """What is left once unused memory is given back. Waits for the device."""

    def forget_peak(self) -> None:
        """From now on DeviceMemory.peak counts anew."""


class CudaDevice:
    """The current GPU."""

    def __init__(self) -> None:
        self._pool: Any = None  # memory that all graphs share, gone with the last of them
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self._downloads: Any = None  # the stream of copies to the host

    def zeros(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device="cuda")

    def pinned(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, pin_memory=True)

    def upload(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def download(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Callable[[], None]:
        if self._downloads is None:
            self._downloads = torch.cuda.Stream()
        stream, device = self._downloads, torch.cuda.current_device()
        stream.wait_stream(torch.cuda.current_stream())
        done = torch.cuda.Event(blocking=True)  # whoever waits for it sleeps
        with torch.cuda.stream(stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
                source.record_stream(stream)  # its memory is not used again before
            done.record(stream)

        def wait() -> None:
            with torch.cuda.device(device):  # of a thread that never used this one
                done.synchronize()

        return wait

    def capture(self, run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        run()  # so that kernels are compiled and libraries have made their workspaces
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads may wait for downloads and for NCCL meanwhile.
        pool = self._pool if self._graphs else None
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result = run()
        self._pool = graph.pool()
        self._graphs.add(graph)
        graph.replay()
        return graph.replay, result

    def memory(self) -> DeviceMemory:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        reserved, peak = torch.cuda.memory_reserved(), torch.cuda.max_memory_allocated()
        return DeviceMemory(total, free, reserved, peak)

    def forget_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()


def num_gpus() -> int:
    """GPUs that this process can see."""
    return torch.cuda.device_count()


def take_gpu(index: int, fraction: float) -> None:
    """This process uses GPU `index` from now on, and at most `fraction` of its memory."""
    torch.cuda.set_device(index)
    torch.cuda.set_per_process_memory_fraction(fraction)
