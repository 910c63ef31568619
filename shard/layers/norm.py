"""RMSNorm, whole on every rank."""

from __future__ import annotations

import torch

from headgate.kernels import ops
from headgate.shard.load_context import LoadContext


class RMSNorm:
    """Scales vectors of `size` to a root mean square of one, then by a weight."""

    def __init__(self, context: LoadContext, name: str, size: int) -> None:
        self.weight = context.weights.replicated(f"{name}.weight", (size,))
        self.eps = context.config.rms_norm_eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return ops.rms_norm(x, self.weight, self.eps)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm of x + residual, x + residual). x may be parts, see Group.parts. Both inputs may be
        overwritten."""
        return ops.rms_norm_residual(x, residual, self.weight, self.eps)
