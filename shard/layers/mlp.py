"""The gated MLP on a norm: down(activation(gate(x)) * up(x)), split by columns of the middle."""

from __future__ import annotations

import torch

from headgate.kernels import ops
from headgate.shard.errors import ModelError
from headgate.shard.layers.linear import ColumnLinear, RowLinear
from headgate.shard.layers.norm import RMSNorm
from headgate.shard.load_context import LoadContext

_ACTIVATIONS: dict[str, ops.Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


class GatedMLP:
    """`prefix`: the MLP's name in the checkpoint, e.g. model.layers.0.mlp."""

    def __init__(self, context: LoadContext, prefix: str, norm: RMSNorm, bias: bool) -> None:
        name = context.config.hidden_act
        if name not in _ACTIVATIONS:
            raise ModelError(
                f"config.json: hidden_act {name!r} is not supported; known: "
                f"{', '.join(_ACTIVATIONS)}"
            )
        self._activation = _ACTIVATIONS[name]
        self._norm = norm
        self._gate_up = ColumnLinear.gate_up(context, prefix, bias)
        self._down = RowLinear.down(context, f"{prefix}.down_proj", bias)

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x, residual[T, hidden_size] to (what it makes of the norm of their sum, or parts of it
        for the next norm; their sum)."""
        return self._down.parts_of_gated(self._activation, self._gate_up, self._norm, x, residual)
