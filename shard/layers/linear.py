"""Linear layers split over the ranks: by columns of the result, or by rows of the product.

Weights says in what form and dtype the matrices are held. On a CPU results are float32.
"""

from __future__ import annotations

import torch

from headgate.kernels import ops
from headgate.shard.distributed import Group
from headgate.shard.layers.norm import RMSNorm
from headgate.shard.load_context import LoadContext
from headgate.shard.weights import Fused, Matrix


class ColumnLinear:
    """Part of the outputs on each rank; no exchange."""

    def __init__(self, weight: Matrix, bias: torch.Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias

    @classmethod
    def gate_up(cls, context: LoadContext, prefix: str, bias: bool) -> ColumnLinear:
        """This rank's columns of gate, then of up. `prefix`: the MLP's name."""
        size, columns = context.config.intermediate_size, context.mlp_columns
        fused = Fused(
            parts=("gate_proj", "up_proj"),
            whole="gate_up_proj",
            sizes=(size, size),
            cuts=((0, columns), (1, columns)),
        )
        return cls.fused(context, prefix, fused, bias)

    @classmethod
    def fused(cls, context: LoadContext, prefix: str, fused: Fused, bias: bool) -> ColumnLinear:
        """`prefix`: the name of the layer that the parts belong to."""
        weights = context.weights
        weight = weights.fused_rows(prefix, fused, context.config.hidden_size)
        return cls(weight, weights.fused_bias(prefix, fused) if bias else None)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return ops.linear(x, self.weight, self.bias)

    def after_norm(
        self, norm: RMSNorm, x: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(of the norm of x + residual, x + residual); a residual of None adds nothing. x may be
        parts, see Group.parts. Both inputs may be overwritten."""
        return ops.rms_norm_linear(x, residual, norm.weight, norm.eps, self.weight, self.bias)


class RowLinear:
    """Part of the inputs on each rank; the partial results are summed over the group."""

    def __init__(self, weight: Matrix, bias: torch.Tensor | None, group: Group) -> None:
        self.weight = weight
        self.bias = bias
        self._group = group

    @classmethod
    def output(cls, context: LoadContext, name: str, bias: bool) -> RowLinear:
        """Attention's output projection, from this rank's heads."""
        dim = context.config.head_dim
        size = context.config.num_heads * dim
        columns = range(context.heads.start * dim, context.heads.stop * dim)
        return cls._of(context, name, size, columns, bias)

    @classmethod
    def down(cls, context: LoadContext, name: str, bias: bool) -> RowLinear:
        """The MLP's second projection, from this rank's columns."""
        return cls._of(context, name, context.config.intermediate_size, context.mlp_columns, bias)

    @classmethod
    def _of(
        cls, context: LoadContext, name: str, size: int, columns: range, bias: bool
    ) -> RowLinear:
        width = context.config.hidden_size
        weight = context.weights.columns(f"{name}.weight", (width, size), columns)
        if bias and context.group.rank != 0:  # the sum must hold it once
            context.weights.ignore(f"{name}.bias")
            bias = False
        row_bias = context.weights.replicated(f"{name}.bias", (width,)) if bias else None
        return cls(weight, row_bias, context.group)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._group.all_reduce(ops.linear(x, self.weight, self.bias))

    def parts(self, x: torch.Tensor) -> torch.Tensor:
        """For a norm to read that adds it to a residual: see Group.parts."""
        return self._group.parts(ops.linear(x, self.weight, self.bias))

    def parts_of_gated(
        self,
        activation: ops.Activation,
        gate_up: ColumnLinear,
        norm: RMSNorm,
        x: torch.Tensor,
        residual: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(as `parts`, of activation(gate) * up with [gate, up] = `gate_up` of the norm of
        x + residual; that sum), as `after_norm` takes it."""
        first, second = (gate_up.weight, gate_up.bias), (self.weight, self.bias)
        out, total = ops.gated_mlp(x, residual, norm.weight, norm.eps, first, activation, second)
        return self._group.parts(out), total
