"""What the C++ takes as rows of numbers."""

from __future__ import annotations

import torch


def is_rows(x: torch.Tensor) -> bool:
    """float32 whose last dimension is without gaps."""
    return x.dtype == torch.float32 and x.stride(-1) == 1


def as_matrix(x: torch.Tensor) -> torch.Tensor:
    """[..., N] as [rows, N] with one stride between rows; copied where there is no such view."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
