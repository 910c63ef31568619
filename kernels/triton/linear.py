"""The linear layer: cuBLAS for weights as they are, linear_int8.py and linear_weight_only.py for
quantised ones.

Shapes: x[T, K] -> [T, N]. cuBLAS chooses its order of summation by T too: on a GPU a row's bits may
depend on how many rows are computed beside it, unless its weights are quantised. With
`--batch-invariant` linear_dense.py takes the place of cuBLAS, and says what that costs.
"""

from __future__ import annotations

import torch

from headgate.kernels import reference
from headgate.kernels.quantised import QuantisedTensor
from headgate.kernels.triton.linear_int8 import linear_grouped_inputs
from headgate.kernels.triton.linear_weight_only import linear_weight_only
from headgate.kernels.triton.packed_weight import PackedQuantised


def pack_linear(
    weight: torch.Tensor, dtype: torch.dtype, quantize: str = "", precision: str = "highest"
) -> torch.Tensor | PackedQuantised | reference.RoundedTensor:
    packed = reference.pack_linear(weight, dtype, quantize, precision)
    return PackedQuantised.of(packed) if isinstance(packed, QuantisedTensor) else packed


def linear(
    x: torch.Tensor, weight: torch.Tensor | PackedQuantised, bias: torch.Tensor | None
) -> torch.Tensor:
    if not isinstance(weight, PackedQuantised):
        return reference.linear(x, weight, bias)
    rows = x if x.dim() == 2 and x.stride(-1) == 1 else x.reshape(-1, x.shape[-1])
    multiply = linear_grouped_inputs if weight.kind.per_channel else linear_weight_only
    return multiply(rows, weight, bias).view(*x.shape[:-1], weight.shape[0])
