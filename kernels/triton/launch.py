"""Starting a kernel, on a GPU or in Triton's interpreter; or only noting that it would be.

Every launcher goes through `launch`, so that what `report.py` compiles ahead of time is what runs:
it calls the launchers themselves, with tensors that have no memory, inside `recording`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

# Under the interpreter a kernel is Python over NumPy, on CPU tensors. Fixed when the kernels are
# decorated, that is when this package is imported.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

_FALLBACK_CHIP = "sm_90"  # whose tiles the interpreter uses


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel with all that its machine code depends on."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]  # tensors and numbers, in the kernel's order
    constants: dict[str, Any]  # its constexpr parameters
    warps: int
    stages: int


@dataclass(slots=True)
class _Recorder:
    chip: str
    launches: list[Launch] = field(default_factory=list)


_recorder: _Recorder | None = None


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
    *,
    warps: int,
    stages: int = 2,
) -> None:
    """Runs `kernel` on every program of `grid`; nothing where the grid is empty.

    `warps` of 32 threads share a program; loads of `stages` rounds of a loop are under way at once.
    """
    if 0 in grid:
        return
    if _recorder is not None:
        _recorder.launches.append(Launch(kernel, grid, arguments, constants, warps, stages))
        return
    # A compiler that changes its mind about fused multiply-add would change results.
    kernel[grid](*arguments, **constants, num_warps=warps, num_stages=stages, enable_fp_fusion=True)


@contextmanager
def recording(chip: str) -> Iterator[list[Launch]]:
    """Launches in the block are noted, not made, with the tiles of `chip`, e.g. "sm_90"."""
    global _recorder
    before, _recorder = _recorder, _Recorder(chip)
    try:
        yield _recorder.launches
    finally:
        _recorder = before


def chip() -> str:
    """Which tiles to take: "sm_90" where this process's GPU has compute capability 9.0."""
    return _recorder.chip if _recorder is not None else _present_chip()


@cache
def _present_chip() -> str:
    if INTERPRETED.value or not torch.cuda.is_available():
        return _FALLBACK_CHIP
    return "sm_{}{}".format(*torch.cuda.get_device_capability())


@triton.jit
def dot(a, b, total):
    """total + a @ b in float32. The interpreter has no product of bfloat16: it gets the same
    values as float32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")
