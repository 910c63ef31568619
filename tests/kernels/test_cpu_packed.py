"""Packed weights, element by element, against the layout that kernels/cpu/linear.h describes."""

from __future__ import annotations

import pytest
import torch

from headgate.kernels.cpu import weight_memory
from headgate.kernels.cpu.packed import PackedWeight

pytestmark = pytest.mark.usefixtures("cpu_kernels")

PANEL = 32
SIZES = [(1, 1), (32, 64), (70, 33), (100, 259)]


def used_memory(nbytes: int) -> torch.Tensor:
    """Not zeros: so missing columns have to be written, too."""
    return torch.full((nbytes,), 255, dtype=torch.uint8)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_panels_hold_the_weight(
    size: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_memory, "allocate", used_memory)
    columns, inner = size
    weight = torch.randn(size, generator=torch.Generator().manual_seed(1)).to(dtype)
    pairs = dtype == torch.bfloat16
    padded = torch.zeros(-(-columns // PANEL) * PANEL, inner + inner % 2 * pairs, dtype=dtype)
    padded[:columns, :inner] = weight
    panels = padded.view(-1, PANEL, padded.shape[1]).transpose(1, 2)
    if pairs:  # two k's of a column lie together, the second one first
        panels = panels.unflatten(1, (-1, 2)).flip(2).transpose(2, 3)
    packed = PackedWeight(weight, dtype)
    assert packed.nbytes == padded.nbytes
    assert torch.equal(packed._memory.view(dtype), panels.flatten())
