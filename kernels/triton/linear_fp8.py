"""Products of weights and inputs in 8-bit floats (float8_e4m3fn), on tensor cores that take them.

Shapes: x[T, K] -> [T, N]. A weight float8[N, K] has one scale, one a row (channel), or one a block
of 128 x 128; inputs are quantised when they come, with one scale a row or, for blocks, one for each
128 of K ("DeepSeek-V3 Technical Report", 2024, section 3.3). dtypes in and out: float32, bfloat16,
float16; sums are float32. Bytes moved: N K, 2 T K of inputs and 2 T N of results. Operations:
2 T N K. It needs compute capability 8.9: older tensor cores have no 8-bit floats.

A row's bits don't depend on the rows beside it: see product.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from headgate.kernels.reference_products import FP8, FP8_BLOCK, FP8_LARGEST, fp8_scales_of
from headgate.kernels.triton.launch import dot, launch
from headgate.kernels.triton.product import multiply, num_splits, store_tile
from headgate.kernels.triton.tuning import LinearTile, tuned

_SMALLEST_INPUT = 1e-30  # as in the reference
_TILE = LinearTile(rows=64, columns=64, inner=128, warps=4, stages=3)
_QUANTISED_AT_ONCE = 1024


@triton.jit
def quantise_fp8_kernel(
    values_ptr,
    scales_ptr,
    x_ptr,
    x_stride,
    inner,
    num_groups,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,  # of a group, at a time
    GROUPS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    groups = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    group_inside = groups < num_groups
    largest = tl.zeros((GROUPS,), tl.float32)
    for start in range(0, GROUP, BLOCK):
        within = start + tl.arange(0, BLOCK)
        k = groups[:, None] * GROUP + within[None, :]
        here = group_inside[:, None] & (within < GROUP)[None, :] & (k < inner)
        x = tl.load(x_ptr + row * x_stride + k, here, 0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(x), 1))
    zero = largest < SMALLEST
    # The reciprocal first, as torch divides a number by a tensor: the same bits as the reference.
    inverse = tl.where(zero, 0.0, tl.div_rn(1.0, tl.where(zero, 1.0, largest)) * LARGEST)
    for start in range(0, GROUP, BLOCK):
        within = start + tl.arange(0, BLOCK)
        k = groups[:, None] * GROUP + within[None, :]
        here = group_inside[:, None] & (within < GROUP)[None, :] & (k < inner)
        x = tl.load(x_ptr + row * x_stride + k, here, 0.0).to(tl.float32)
        small = tl.minimum(tl.maximum(x * inverse[:, None], -LARGEST), LARGEST)
        tl.store(values_ptr + row * inner + k, small.to(tl.float8e4nv), here)
    scale = tl.where(zero, 0.0, tl.div_rn(largest, LARGEST))
    tl.store(scales_ptr + row * num_groups + groups, scale, group_inside)


def quantise_fp8(x: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As the reference."""
    rows, inner = x.shape
    groups = triton.cdiv(inner, group)
    values = torch.empty((rows, inner), dtype=FP8, device=x.device)
    scales = torch.empty((rows, groups), dtype=torch.float32, device=x.device)
    block = min(triton.next_power_of_2(group), _QUANTISED_AT_ONCE)
    at_once = min(triton.next_power_of_2(groups), _QUANTISED_AT_ONCE // block)
    launch(
        quantise_fp8_kernel,
        (rows, triton.cdiv(groups, at_once)),
        (values, scales, x, x.stride(0), inner, groups),
        {
            "SMALLEST": _SMALLEST_INPUT,
            "LARGEST": FP8_LARGEST,
            "GROUP": group,
            "BLOCK": block,
            "GROUPS": at_once,
        },
        warps=min(4, max(1, block * at_once // 256)),
    )
    return values, scales


@triton.jit
def _scaled(
    part,
    x_scales_ptr,
    scales_ptr,
    rows,
    columns,
    num_rows,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """A split's sum times its scales, before splits are added, whoever adds them. The last product
    is a fused one, so that the compiler cannot fuse it with that addition in one kernel only."""
    part *= tl.load(scales_ptr + columns * CHANNELS, columns < WIDTH, 0.0).to(tl.float32)[None, :]
    x_scale = tl.load(x_scales_ptr + rows, rows < num_rows, 0.0)[:, None]
    return tl.fma(part, tl.broadcast_to(x_scale, part.shape), tl.zeros_like(part))


@triton.jit(do_not_specialize=["num_rows"])
def linear_fp8_kernel(
    target_ptr,
    bias_ptr,
    x_ptr,
    x_scales_ptr,
    weight_ptr,
    scales_ptr,
    num_rows,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,  # of K and of N, that share a scale, where they are scaled by blocks
    BLOCKS: tl.constexpr,
    CHANNELS: tl.constexpr,  # whether each has a scale of its own
    STEP: tl.constexpr,
    GROUPS_A_SPLIT: tl.constexpr,
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
    ks = tl.arange(0, STEP)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    first = 0 if SERIAL else tl.program_id(2)
    for split in range(first, SPLITS if SERIAL else first + 1):
        part = tl.zeros((ROWS, COLUMNS), tl.float32)
        for group in range(split * GROUPS_A_SPLIT, min((split + 1) * GROUPS_A_SPLIT, groups)):
            sums = tl.zeros((ROWS, COLUMNS), tl.float32)
            for step in range(GROUP // STEP):
                k = group * GROUP + step * STEP + ks
                inside = (k < INNER)[None, :]
                at = columns[:, None] * INNER + k[None, :]
                weight = tl.load(weight_ptr + at, column_inside[:, None] & inside, 0.0)
                at = rows[:, None] * INNER + k[None, :]
                x = tl.load(x_ptr + at, row_inside[:, None] & inside, 0.0)
                if BLOCKS:
                    sums = dot(x, tl.trans(weight), sums)
                else:
                    part = dot(x, tl.trans(weight), part)
            if BLOCKS:
                at = columns // GROUP * groups + group
                scale = tl.load(scales_ptr + at, column_inside, 0.0).to(tl.float32)
                x_scale = tl.load(x_scales_ptr + rows * groups + group, row_inside, 0.0)
                part = tl.fma(sums, scale[None, :] * x_scale[:, None], part)
        if SERIAL and not BLOCKS:
            part = _scaled(part, x_scales_ptr, scales_ptr, rows, columns, num_rows, WIDTH, CHANNELS)
        total += part
    if not SERIAL and not BLOCKS:
        total = _scaled(total, x_scales_ptr, scales_ptr, rows, columns, num_rows, WIDTH, CHANNELS)
    store_tile(target_ptr, bias_ptr, total, rows, columns, num_rows, WIDTH, BIAS)


def linear_fp8(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """As the reference. Raises ValueError for scales of another shape."""
    width, inner = weight.shape
    sharing = fp8_scales_of(weight, scales)
    blocks = sharing == FP8_BLOCK
    values, x_scales = quantise_fp8(x, FP8_BLOCK if blocks else inner)
    tile = tuned("linear_fp8", f"{width}x{inner}/{sharing}", _TILE)
    splits = num_splits(width, inner, FP8_BLOCK)
    out = torch.empty((x.shape[0], width), dtype=x.dtype, device=x.device)
    multiply(
        linear_fp8_kernel,
        out,
        bias,
        (values, x_scales, weight, scales, x.shape[0]),
        {
            "WIDTH": width,
            "INNER": inner,
            "GROUP": FP8_BLOCK,
            "BLOCKS": blocks,
            "CHANNELS": sharing == 1,
            "STEP": min(FP8_BLOCK, tile.inner),
            "GROUPS_A_SPLIT": triton.cdiv(triton.cdiv(inner, FP8_BLOCK), splits),
        },
        tile,
        splits,
    )
    return out
