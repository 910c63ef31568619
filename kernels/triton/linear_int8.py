"""Products of weights in 8 or 4 bits: by whole numbers where the inputs are quantised too.

Shapes: x[T, K] -> [T, N] for a weight of N rows, in groups of S along K with a scale each, as
`headgate.kernels.quantised` defines them (int8, int8-weight-only, int4); and per channel (one scale
a row of the weight, one a row of the input), the "w8a8" of published checkpoints. dtypes: float32,
bfloat16, float16 in and out; sums of a group are int32, groups are added in float32.
Bytes moved: N K (8 bits) or N K / 2 (4 bits), the scales, 2 T K of inputs and 2 T N of results.
Operations: 2 T N K, on tensor cores. Scaling each group costs as much again where S is 64 and T
large: a product per channel has no such cost.

A row's bits don't depend on the rows beside it: see product.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from headgate.kernels.quantised import QuantisedTensor, QuantKind
from headgate.kernels.triton.launch import dot, launch
from headgate.kernels.triton.narrow import quantised, scale_of
from headgate.kernels.triton.product import multiply, num_splits, store_tile
from headgate.kernels.triton.tuning import LinearTile, tuned

_TILE = LinearTile(rows=64, columns=64, inner=128, warps=4, stages=3)
_QUANTISED_AT_ONCE = 1024


@dataclass(frozen=True, slots=True, eq=False)
class PackedQuantised:
    """A QuantisedTensor as the kernel reads it; G groups of S values."""

    kind: QuantKind
    inner: int  # K
    values: torch.Tensor  # int8[N, G * S]; int4: uint8[N, G * S / 2], the even k's in the low bits
    scales: torch.Tensor  # bfloat16[G, N]
    minima: torch.Tensor | None  # the same; int4 only

    @classmethod
    def of(cls, weight: QuantisedTensor) -> PackedQuantised:
        values = weight.values.flatten(1)
        if weight.kind.offset:
            pairs = values.to(torch.uint8).unflatten(1, (-1, 2))
            values = pairs[..., 0] | pairs[..., 1] << 4
        minima = None if weight.minima is None else weight.minima.T.contiguous()
        # A channel's one scale stands in every group, where the kernel looks for it.
        scales = weight.scales.expand(-1, weight.values.shape[1]).T.contiguous()
        return cls(weight.kind, weight.inner, values.contiguous(), scales, minima)

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.inner

    @property
    def nbytes(self) -> int:
        parts = (self.values, self.scales, self.minima)
        return sum(part.nbytes for part in parts if part is not None)


@triton.jit
def quantise_rows_kernel(
    values_ptr,
    scales_ptr,
    x_ptr,
    x_stride,
    inner,
    num_groups,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    groups = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    within = tl.arange(0, COLUMNS)
    k = groups[:, None] * GROUP + within[None, :]
    here = (groups < num_groups)[:, None] & (within < GROUP)[None, :]
    x = tl.load(x_ptr + row * x_stride + k, here & (k < inner), 0.0).to(tl.float32)
    scale, inverse = scale_of(tl.max(tl.abs(x), 1))
    tl.store(values_ptr + row * num_groups * GROUP + k, quantised(x, inverse), here)
    tl.store(scales_ptr + row * num_groups + groups, scale, groups < num_groups)


def quantise_rows(x: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x[T, K] as int8[T, G * S], filled up with zeros, and its scales float32[T, G]."""
    rows, inner = x.shape
    groups = triton.cdiv(inner, group)
    values = torch.empty((rows, groups * group), dtype=torch.int8, device=x.device)
    scales = torch.empty((rows, groups), dtype=torch.float32, device=x.device)
    columns = triton.next_power_of_2(group)
    at_once = max(1, min(triton.next_power_of_2(groups), _QUANTISED_AT_ONCE // columns))
    launch(
        quantise_rows_kernel,
        (rows, triton.cdiv(groups, at_once)),
        (values, scales, x, x.stride(0), inner, groups),
        {
            "GROUP": group,
            "COLUMNS": columns,
            "GROUPS": at_once,
        },
        warps=min(8, max(1, at_once * columns // 256)),
    )
    return values, scales


@triton.jit(do_not_specialize=["num_rows"])
def linear_int8_kernel(
    target_ptr,
    bias_ptr,
    x_ptr,
    x_scales_ptr,
    weight_ptr,
    scales_ptr,
    minima_ptr,
    num_rows,
    x_stride,
    x_scales_stride,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
    STEP: tl.constexpr,
    GROUPS_A_SPLIT: tl.constexpr,
    ONE_SCALE: tl.constexpr,  # for all groups: scales[N], x_scales[T]
    OFFSET: tl.constexpr,
    INPUTS: tl.constexpr,
    SPLITS: tl.constexpr,
    SERIAL: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    row_inside, column_inside = rows < num_rows, columns < WIDTH
    groups: tl.constexpr = (INNER + GROUP - 1) // GROUP
    padded: tl.constexpr = groups * GROUP
    ks = tl.arange(0, STEP)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    first = 0 if SERIAL else tl.program_id(2)
    for split in range(first, SPLITS if SERIAL else first + 1):
        part = tl.zeros((ROWS, COLUMNS), tl.float32)
        last_group = min((split + 1) * GROUPS_A_SPLIT, groups)
        for group in range(split * GROUPS_A_SPLIT, last_group):
            scale_row = 0 if ONE_SCALE else group
            scale = tl.load(scales_ptr + scale_row * WIDTH + columns, column_inside, 0.0)
            scale = scale.to(tl.float32)
            sums = tl.zeros((ROWS, COLUMNS), tl.int32)
            totals = tl.zeros((ROWS,), tl.int32)
            for step in range(GROUP // STEP):
                k = group * GROUP + step * STEP + ks
                if OFFSET:
                    half = (group * GROUP + step * STEP) // 2 + tl.arange(0, STEP // 2)
                    at = columns[:, None] * (padded // 2) + half[None, :]
                    pairs = tl.load(weight_ptr + at, column_inside[:, None], 0)
                    joined = tl.join((pairs & 15).to(tl.int8), (pairs >> 4).to(tl.int8))
                    weight = tl.reshape(joined, (COLUMNS, STEP))
                else:
                    at = columns[:, None] * padded + k[None, :]
                    weight = tl.load(weight_ptr + at, column_inside[:, None], 0)
                inside = row_inside[:, None] & (k < (padded if INPUTS else INNER))[None, :]
                x = tl.load(x_ptr + rows[:, None] * x_stride + k[None, :], inside, 0)
                if INPUTS:
                    sums = tl.dot(x, tl.trans(weight), sums, out_dtype=tl.int32)
                    if OFFSET:
                        totals += tl.sum(x.to(tl.int32), 1)
                else:
                    wide = (weight.to(tl.float32) * scale[:, None]).to(x.dtype)
                    part = dot(x, tl.trans(wide), part)
            if INPUTS:
                at = rows * x_scales_stride + scale_row
                x_scale = tl.load(x_scales_ptr + at, row_inside, 0.0)
                part = tl.fma(sums.to(tl.float32), scale[None, :] * x_scale[:, None], part)
                if OFFSET:
                    minimum = tl.load(minima_ptr + group * WIDTH + columns, column_inside, 0.0)
                    minimum = minimum.to(tl.float32)[None, :] + tl.zeros_like(part)
                    part = tl.fma(minimum, (x_scale * totals)[:, None] + tl.zeros_like(part), part)
        total += part
    store_tile(target_ptr, bias_ptr, total, rows, columns, num_rows, WIDTH, BIAS)


def linear_quantised(
    x: torch.Tensor, weight: PackedQuantised, bias: torch.Tensor | None
) -> torch.Tensor:
    """As the reference's `linear` with the QuantisedTensor; the result has the dtype of x[T, K]."""
    kind = weight.kind
    if kind.inputs:
        values, scales = quantise_rows(x, kind.group)
    else:
        values, scales = x, x  # no scales are read
    minima = weight.scales if weight.minima is None else weight.minima
    arguments = (values, scales, weight.values, weight.scales, minima)
    return _linear(x, arguments, bias, weight.shape, kind, one_scale=False)


def linear_int8(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """x[T, K], quantised row by row, times weight int8[N, K] with scales[N]: [T, N] as x."""
    width, inner = weight.shape
    values, x_scales = quantise_rows(x, inner)
    # The sum of a channel is scaled once a piece of K, instead of once: no sum is too long for it.
    piece = next((size for size in (1024, 512, 256, 128, 64, 32) if inner % size == 0), None)
    if piece is None:
        raise ValueError(f"linear_int8 takes a K that 32 divides, not {inner}")
    kind = QuantKind("int8 per channel", group=piece)
    arguments = (values, x_scales, weight, scales, scales)
    return _linear(x, arguments, bias, (width, inner), kind, one_scale=True)


def _linear(
    x: torch.Tensor,
    arguments: tuple[torch.Tensor, ...],
    bias: torch.Tensor | None,
    shape: tuple[int, int],
    kind: QuantKind,
    one_scale: bool,
) -> torch.Tensor:
    width, inner = shape
    tile = tuned("linear_int8", f"{width}x{inner}/{kind.name}", _TILE)
    groups = triton.cdiv(inner, kind.group)
    splits = num_splits(width, inner, kind.group, tile.columns)
    out = torch.empty((x.shape[0], width), dtype=x.dtype, device=x.device)
    values, x_scales = arguments[:2]
    multiply(
        linear_int8_kernel,
        out,
        bias,
        (*arguments, x.shape[0], values.stride(0), x_scales.stride(0)),
        {
            "WIDTH": width,
            "INNER": inner,
            "GROUP": kind.group,
            "STEP": min(kind.group, tile.inner),
            "GROUPS_A_SPLIT": triton.cdiv(groups, splits),
            "ONE_SCALE": one_scale,
            "OFFSET": kind.offset,
            "INPUTS": kind.inputs,
        },
        tile,
        splits,
    )
    return out
