"""The gated MLP: down(activation(gate(x)) * up(x)), split by columns of the middle."""

from __future__ import annotations

from collections.abc import Callable

import torch

from headgate.kernels import ops
from headgate.shard.errors import ModelError
from headgate.shard.layers.linear import ColumnLinear, RowLinear
from headgate.shard.load_context import LoadContext

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": ops.silu_and_mul,
    "swish": ops.silu_and_mul,
    "gelu": ops.gelu_and_mul,
    "gelu_new": lambda x: ops.gelu_and_mul(x, tanh=True),
    "gelu_pytorch_tanh": lambda x: ops.gelu_and_mul(x, tanh=True),
}


class GatedMLP:
    """`prefix`: the MLP's name in the checkpoint, e.g. model.layers.0.mlp."""

    def __init__(self, context: LoadContext, prefix: str, bias: bool) -> None:
        name = context.config.hidden_act
        if name not in _ACTIVATIONS:
            raise ModelError(
                f"config.json: hidden_act {name!r} is not supported; known: "
                f"{', '.join(_ACTIVATIONS)}"
            )
        self._activation = _ACTIVATIONS[name]
        self._gate_up = ColumnLinear.gate_up(context, prefix, bias)
        self._down = RowLinear.down(context, f"{prefix}.down_proj", bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, hidden_size] to the same, or parts of it for RMSNorm.add."""
        return self._down.parts(self._activation(self._gate_up(x)))
