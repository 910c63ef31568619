"""Plain torch of the products that have quantised or grouped weights: see `reference`.

Shapes: T tokens, K inputs, N outputs, E experts, S adapter slots. Sums are float32 whatever the
inputs' dtype; results have the inputs' dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from headgate.kernels import quantised
from headgate.kernels.int4_weight import Int4Weight

FP8 = torch.float8_e4m3fn
FP8_LARGEST = 448.0
FP8_BLOCK = 128  # rows and columns of a weight that share a scale, where it is scaled by blocks
_SMALLEST_INPUT = 1e-30  # inputs all below are zeros: their scale would have no reciprocal


def linear_int8(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """x[T, K], quantised row by row, times weight int8[N, K] with scales[N]: [T, N]."""
    values, x_scales = quantised.quantise_inputs(x.float(), x.shape[1])
    sums = values.flatten(1).double() @ weight.double().T  # exact
    return _with_bias(sums.float() * x_scales * scales.float(), bias, x.dtype)


def quantise_fp8(x: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x[T, K] as float8[T, K] and scales float32[T, G], one for each `group` of K."""
    inner = x.shape[1]
    groups = F.pad(x.float(), (0, -inner % group)).unflatten(-1, (-1, group))
    largest = groups.abs().amax(-1)
    largest = torch.where(largest < _SMALLEST_INPUT, 0.0, largest)
    inverse = torch.where(largest > 0, FP8_LARGEST / largest, 0.0)
    values = (groups * inverse.unsqueeze(-1)).clamp(-FP8_LARGEST, FP8_LARGEST).to(FP8)
    return values.flatten(1)[:, :inner], largest / FP8_LARGEST


def linear_fp8(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """x[T, K], quantised when it comes, times weight float8[N, K]: [T, N].

    The shape of `scales` says what they are of: [1] of the tensor, [N] of channels (x: one a row),
    [ceil(N / 128), ceil(K / 128)] of blocks (x: one for each 128 of a row). Raises ValueError.
    """
    blocks = fp8_scales_of(weight, scales) == FP8_BLOCK
    group = FP8_BLOCK if blocks else x.shape[1]
    values, x_scales = quantise_fp8(x, group)
    width, inner = weight.shape
    if blocks:
        spread = scales.repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)
        spread = spread[:width, :inner]
    else:
        spread = scales.reshape(-1, 1)
    wide = values.float() * x_scales.repeat_interleave(group, 1)[:, :inner]
    return _with_bias(wide @ (weight.float() * spread.float()).T, bias, x.dtype)


def fp8_scales_of(weight: torch.Tensor, scales: torch.Tensor) -> int:
    """How many rows of the weight share a scale: 0 for all, 1, or 128. Raises ValueError."""
    width, inner = weight.shape
    blocks = (-(-width // FP8_BLOCK), -(-inner // FP8_BLOCK))
    rows = {(1,): 0, (width,): 1, blocks: FP8_BLOCK}.get(tuple(scales.shape))
    if rows is None:
        raise ValueError(
            f"a float8 weight {width} x {inner} has scales [1], [{width}] or {list(blocks)},"
            f" not {list(scales.shape)}"
        )
    return rows


def linear_int4(x: torch.Tensor, weight: Int4Weight, bias: torch.Tensor | None) -> torch.Tensor:
    """x[T, K] times the matrix that `weight` stands for: [T, N]."""
    return _with_bias(x.float() @ weight.dequantise().T, bias, x.dtype)


def route(logits: torch.Tensor, top_k: int, renormalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The `top_k` likeliest experts of each row of logits[T, E] and their probabilities, best
    first: int32[T, k], float32[T, k]. `renormalise`: they then sum to 1."""
    weights, experts = logits.float().softmax(-1).sort(dim=-1, descending=True, stable=True)
    weights, experts = weights[:, :top_k], experts[:, :top_k]
    if renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return experts.int(), weights


def moe_mlp(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
) -> torch.Tensor:
    """Sum over the experts int32[T, k] of a row of x[T, H] of its weight float32[T, k] times
    down[E, H, I] (silu(gate) * up), with [gate, up] = gate_up[E, 2I, H] x: [T, H].

    An expert outside 0..E-1 (another rank's) adds nothing. (Shazeer et al., 2017.)
    """
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in range(gate_up.shape[0]):
        rows, places = (experts == expert).nonzero(as_tuple=True)
        gate, up = (x[rows].float() @ gate_up[expert].float().T).chunk(2, -1)
        found = (F.silu(gate) * up) @ down[expert].float().T
        out.index_add_(0, rows, found * weights[rows, places, None])
    return out.to(x.dtype)


def add_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    slots: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: torch.Tensor,
) -> torch.Tensor:
    """y[T, N] + scaling[s] * b[s] (a[s] x), in place, with s = slots int32[T] of each row of
    x[T, K]; below 0: none. a[S, r, K], b[S, N, r], scaling float32[S]. (Hu et al., 2021.)"""
    for slot in range(a.shape[0]):
        rows = (slots == slot).nonzero().squeeze(1)
        low = x[rows].float() @ a[slot].float().T
        added = low @ b[slot].float().T * scaling[slot]
        y[rows] = (y[rows].float() + added).to(y.dtype)
    return y


def _with_bias(
    product: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    return (product if bias is None else product + bias.float()).to(dtype)


OPS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (linear_int8, linear_fp8, linear_int4, route, moe_mlp, add_lora)
}
