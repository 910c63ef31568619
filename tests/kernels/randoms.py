"""Random inputs of the Triton kernels' tests, and how close a result must be."""

from __future__ import annotations

from dataclasses import dataclass

import torch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Relative error, and absolute in units of a result's typical size. Several roundings to the dtype
# are allowed for; the interpreter cuts bfloat16 off where a GPU rounds.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@dataclass
class Randoms:
    """Normal numbers on the device of the kernels."""

    device: str
    seed: int

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)

    def __call__(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator).to(self.device, dtype)

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        """int64 in [low, high)."""
        return torch.randint(low, high, shape, generator=self._generator).to(self.device)


def assert_near(got: torch.Tensor, wanted: torch.Tensor, factor: float = 1.0) -> None:
    """`got` has the dtype under test, `wanted` is the same in float32 or wider."""
    tolerance = TOLERANCE.get(got.dtype, 0.0) * factor
    torch.testing.assert_close(got.to(wanted.dtype), wanted, rtol=tolerance, atol=tolerance)
