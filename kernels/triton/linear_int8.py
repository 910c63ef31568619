"""Products of weights and inputs in 8 bits, by whole numbers.

Shapes: x[T, K] -> [T, N] for a weight of N rows (columns of the result) with one scale each. Inputs
are quantised when they come: with a scale a row and group of 64, which is the kind int8 of
`headgate.kernels.quantised`, or one a row, the "w8a8" of published checkpoints. dtypes: float32,
bfloat16, float16 in and out; sums of a group are int32, groups are added in float32. Bytes moved:
N K, the scales, 3 T K of inputs and 2 T N of results. Operations: 2 T N K, on tensor cores, and two
on each sum of a group.

A row's bits don't depend on the rows beside it: see product.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from headgate.kernels.triton.launch import launch
from headgate.kernels.triton.narrow import quantised, scale_of
from headgate.kernels.triton.packed_weight import PackedQuantised
from headgate.kernels.triton.product import multiply, num_splits, store_tile
from headgate.kernels.triton.tuning import MANY, LinearTile, tile_for, tuned

_FEW = 32  # rows
# No tile changes the bits: sums are whole numbers, and groups are added in the same order. The
# fastest on an H100; other chips have not been measured.
_TILES = {
    "sm_90": {
        _FEW: LinearTile(rows=32, columns=64, inner=64, warps=4, stages=4),
        512: LinearTile(rows=64, columns=64, inner=64, warps=4, stages=4),
        MANY: LinearTile(rows=64, columns=128, inner=64, warps=4, stages=3),
    },
    "": {
        _FEW: LinearTile(rows=32, columns=64, inner=64, warps=4, stages=4),
        MANY: LinearTile(rows=64, columns=64, inner=64, warps=4, stages=3),
    },
}
_QUANTISED_AT_ONCE = 1024
# 1.5 * 2^23: whole numbers up to 2^22 change its last places only.
_FLOAT = tl.constexpr(12582912.0)
_FLOAT_BITS = tl.constexpr(0x4B400000)


@triton.jit(do_not_specialize=["num_rows"])
def quantise_rows_kernel(
    values_ptr,
    scales_ptr,
    x_ptr,
    x_stride,
    inner,
    num_rows,
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
    tl.store(scales_ptr + groups * num_rows + row, scale, groups < num_groups)


def quantise_rows(x: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x[T, K] as int8[T, G * S], filled up with zeros, and its scales float32[G, T]."""
    rows, inner = x.shape
    groups = triton.cdiv(inner, group)
    values = torch.empty((rows, groups * group), dtype=torch.int8, device=x.device)
    scales = torch.empty((groups, rows), dtype=torch.float32, device=x.device)
    columns = triton.next_power_of_2(group)
    at_once = max(1, min(triton.next_power_of_2(groups), _QUANTISED_AT_ONCE // columns))
    launch(
        quantise_rows_kernel,
        (rows, triton.cdiv(groups, at_once)),
        (values, scales, x, x.stride(0), inner, rows, groups),
        {
            "GROUP": group,
            "COLUMNS": columns,
            "GROUPS": at_once,
        },
        warps=min(8, max(1, at_once * columns // 256)),
    )
    return values, scales


@triton.jit
def _along(values, ACROSS: tl.constexpr):
    """A tile's numbers: one for each of its columns, or rows."""
    return values[None, :] if ACROSS else values[:, None]


@triton.jit(do_not_specialize=["num_rows", "x_scales_stride"])
def linear_int8_kernel(
    target_ptr,
    bias_ptr,
    x_ptr,
    x_scales_ptr,
    weight_ptr,
    scales_ptr,
    num_rows,
    x_stride,
    x_scales_stride,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMN_BYTES: tl.constexpr,  # from a group of a column to that of the next column
    GROUP_BYTES: tl.constexpr,  # from a group of a column to its next one
    GROUPS_A_SPLIT: tl.constexpr,
    ONE_INPUT_SCALE: tl.constexpr,  # x_scales[1, T], the same for all groups
    SPLITS: tl.constexpr,
    SERIAL: tl.constexpr,
    BIAS: tl.constexpr,
    FEW: tl.constexpr,  # rows: columns are then the tall side of the tensor cores' tiles
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    row_inside, column_inside = rows < num_rows, columns < WIDTH
    height: tl.constexpr = COLUMNS if FEW else ROWS
    breadth: tl.constexpr = ROWS if FEW else COLUMNS
    groups: tl.constexpr = (INNER + GROUP - 1) // GROUP
    ks = tl.arange(0, GROUP)
    nothing = tl.zeros((height, breadth), tl.float32)
    total = nothing
    first = 0 if SERIAL else tl.program_id(2)
    for split in range(first, SPLITS if SERIAL else first + 1):
        part = nothing
        first_group = split * GROUPS_A_SPLIT
        scale_at = (0 if ONE_INPUT_SCALE else first_group) * x_scales_stride + rows
        x_scale = tl.load(x_scales_ptr + scale_at, row_inside, 0.0)
        for group in range(first_group, min(first_group + GROUPS_A_SPLIT, groups)):
            group_ptr = weight_ptr + tl.cast(group, tl.int64) * GROUP_BYTES
            at = columns[:, None] * COLUMN_BYTES + ks[None, :]
            weight = tl.load(group_ptr + at, column_inside[:, None], 0)
            at = rows[:, None] * x_stride + (group * GROUP + ks)[None, :]
            x = tl.load(x_ptr + at, row_inside[:, None], 0)
            # Sums start as the bits of a float whose last places they count in: as that float they
            # need no conversion.
            sums = tl.full((height, breadth), _FLOAT_BITS, tl.int32)
            if FEW:
                sums = tl.dot(weight, tl.trans(x), sums, out_dtype=tl.int32)
            else:
                sums = tl.dot(x, tl.trans(weight), sums, out_dtype=tl.int32)
            wide = sums.to(tl.float32, bitcast=True) - _FLOAT
            if ONE_INPUT_SCALE:
                part += wide
            else:
                part = tl.fma(wide, _along(x_scale, FEW) + nothing, part)
                # Asked for a group ahead: nothing else does.
                scale_at = min(group + 1, groups - 1) * x_scales_stride + rows
                x_scale = tl.load(x_scales_ptr + scale_at, row_inside, 0.0)
        # Fused products, which no compiler fuses with the addition of splits in one kernel only.
        if ONE_INPUT_SCALE:
            part = tl.fma(part, _along(x_scale, FEW) + nothing, nothing)
        scale = tl.load(scales_ptr + columns, column_inside, 0.0).to(tl.float32)
        part = tl.fma(part, _along(scale, not FEW) + nothing, nothing)
        total += part
    if FEW:
        total = tl.trans(total)
    store_tile(target_ptr, bias_ptr, total, rows, columns, num_rows, WIDTH, BIAS)


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where a weight [N, K] has the S values of a column's group."""

    width: int
    inner: int
    group: int  # S
    group_bytes: int  # from a group to the next
    column_bytes: int


def linear_grouped_inputs(
    x: torch.Tensor, weight: PackedQuantised, bias: torch.Tensor | None
) -> torch.Tensor:
    """As the reference's `linear` with the QuantisedTensor of kind int8; the result has the dtype
    of x[T, K]."""
    width, inner = weight.shape
    group_bytes, column_bytes, _ = weight.values.stride()
    layout = _Layout(width, inner, weight.kind.group, group_bytes, column_bytes)
    values, x_scales = quantise_rows(x, weight.kind.group)
    return _linear(x, (values, x_scales, weight.values, weight.scales), bias, layout)


def linear_int8(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """x[T, K], quantised row by row, times weight int8[N, K] with scales[N]: [T, N] as x."""
    width, inner = weight.shape
    group = next((size for size in (128, 64, 32) if inner % size == 0), None)
    if group is None:
        raise ValueError(f"linear_int8 takes a K that 32 divides, not {inner}")
    values, x_scales = quantise_rows(x, inner)
    return _linear(
        x, (values, x_scales, weight, scales), bias, _Layout(width, inner, group, group, inner)
    )


def _linear(
    x: torch.Tensor,
    arguments: tuple[torch.Tensor, ...],
    bias: torch.Tensor | None,
    layout: _Layout,
) -> torch.Tensor:
    width, inner, group = layout.width, layout.inner, layout.group
    values, x_scales = arguments[:2]
    one_scale = x_scales.shape[0] == 1
    size, default = tile_for(x.shape[0], _TILES)
    tile = tuned("linear_int8", f"{width}x{inner}/{'row' if one_scale else group}/{size}", default)
    groups = triton.cdiv(inner, group)
    splits = num_splits(width, inner, group)
    out = torch.empty((x.shape[0], width), dtype=x.dtype, device=x.device)
    multiply(
        linear_int8_kernel,
        out,
        bias,
        (*arguments, x.shape[0], values.stride(0), x_scales.stride(0)),
        {
            "WIDTH": width,
            "INNER": inner,
            "GROUP": group,
            "COLUMN_BYTES": layout.column_bytes,
            "GROUP_BYTES": layout.group_bytes,
            "GROUPS_A_SPLIT": triton.cdiv(groups, splits),
            "ONE_INPUT_SCALE": one_scale,
            "FEW": x.shape[0] <= _FEW,
        },
        tile,
        splits,
    )
    return out
