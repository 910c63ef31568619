"""Linear layers split over the ranks: by columns of the result, or by rows of the product.

On a CPU the matrices are float32 copies made at load, of values rounded to the stored dtype
(Weights says why); elsewhere they are held and multiplied in that dtype.
"""

from __future__ import annotations

import torch

from headgate.kernels import ops
from headgate.shard.distributed import Group
from headgate.shard.load_context import LoadContext


class ColumnLinear:
    """Part of the outputs on each rank; no exchange."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias

    @classmethod
    def qkv(cls, context: LoadContext, prefix: str, bias: bool) -> ColumnLinear:
        """Queries, keys and values of this rank's heads. `prefix`: the attention's name."""
        config, dim = context.config, context.config.head_dim
        heads, kv_heads = _times(context.heads, dim), _times(context.kv_heads, dim)
        return cls._packed(
            context,
            prefix,
            ("q_proj", "k_proj", "v_proj"),
            "qkv_proj",
            (config.num_heads * dim, config.num_kv_heads * dim, config.num_kv_heads * dim),
            (heads, kv_heads, kv_heads),
            bias,
        )

    @classmethod
    def gate_up(cls, context: LoadContext, prefix: str, bias: bool) -> ColumnLinear:
        """This rank's columns of gate, then of up. `prefix`: the MLP's name."""
        size, columns = context.config.intermediate_size, context.mlp_columns
        parts = ("gate_proj", "up_proj")
        return cls._packed(
            context, prefix, parts, "gate_up_proj", (size, size), (columns, columns), bias
        )

    @classmethod
    def _packed(
        cls,
        context: LoadContext,
        prefix: str,
        parts: tuple[str, ...],
        packed: str,
        sizes: tuple[int, ...],
        rows: tuple[range, ...],
        bias: bool,
    ) -> ColumnLinear:
        weights, width = context.weights, context.config.hidden_size
        weight = weights.packed_rows(prefix, parts, packed, "weight", sizes, rows, width)
        if not bias:
            return cls(weight)
        return cls(weight, weights.packed_rows(prefix, parts, packed, "bias", sizes, rows, None))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return ops.linear(x, self.weight, self.bias)


class RowLinear:
    """Part of the inputs on each rank; the partial results are summed over the group."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, group: Group) -> None:
        self.weight = weight
        self.bias = bias
        self._group = group

    @classmethod
    def output(cls, context: LoadContext, name: str, bias: bool) -> RowLinear:
        """Attention's output projection, from this rank's heads."""
        dim = context.config.head_dim
        size = context.config.num_heads * dim
        return cls._of(context, name, size, _times(context.heads, dim), bias)

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


def _times(heads: range, dim: int) -> range:
    """The rows that `heads` of `dim` rows each take."""
    return range(heads.start * dim, heads.stop * dim)
