"""Products with 4-bit weights as GPTQ and AWQ checkpoints hold them, inputs as they are (w4a16).

Shapes: x[T, K] -> [T, N]; `headgate.kernels.int4_weight` describes the two layouts.
dtypes: bfloat16, float16, float32 in and out; scales of any of them; sums are float32. Bytes moved:
N K / 2, the scales, 2 T K of inputs, 2 T N of results. Operations: 2 T N K on tensor cores, and
about 6 N K to unpack, once for each tile of rows.

A row's bits don't depend on the rows beside it: see product.py.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from headgate.kernels.int4_weight import Int4Weight
from headgate.kernels.triton.launch import dot
from headgate.kernels.triton.product import multiply, num_splits, store_tile
from headgate.kernels.triton.tuning import LinearTile, tuned

_SHORTEST_STEP = 16  # of K, for tensor cores
_TILE = LinearTile(rows=64, columns=64, inner=64, warps=4, stages=3)


@triton.jit(do_not_specialize=["num_rows"])
def linear_int4_kernel(
    target_ptr,
    bias_ptr,
    x_ptr,
    weight_ptr,
    zeros_ptr,
    scales_ptr,
    groups_ptr,
    num_rows,
    x_stride,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
    STEP: tl.constexpr,
    STEPS_A_SPLIT: tl.constexpr,
    ZERO_OFFSET: tl.constexpr,
    AWQ: tl.constexpr,
    ORDERED: tl.constexpr,  # groups follow one another; otherwise groups_ptr names them
    SPLITS: tl.constexpr,
    SERIAL: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    row_inside, column_inside = rows < num_rows, columns < WIDTH
    packed = tl.program_id(1).to(tl.int64) * (COLUMNS // 8) + tl.arange(0, COLUMNS // 8)
    eight = tl.arange(0, 8)
    # Bits by which a column is shifted in its word. AWQ: even columns first, then the odd ones.
    shifts = (eight // 2 + eight % 2 * 4) * 4 if AWQ else eight * 4
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    first = 0 if SERIAL else tl.program_id(2)
    for split in range(first, SPLITS if SERIAL else first + 1):
        part = tl.zeros((ROWS, COLUMNS), tl.float32)
        for step in range(split * STEPS_A_SPLIT, (split + 1) * STEPS_A_SPLIT):
            start = step * STEP
            k = start + tl.arange(0, STEP)
            k_inside = k < INNER
            if AWQ:
                at = weight_ptr + k[:, None] * (WIDTH // 8) + packed[None, :]
                words = tl.load(at, k_inside[:, None] & (packed < WIDTH // 8)[None, :], 0)
                weight = (words[:, :, None] >> shifts[None, None, :]) & 15
            else:
                eighths = start // 8 + tl.arange(0, STEP // 8)
                at = weight_ptr + eighths[:, None] * WIDTH + columns[None, :]
                words = tl.load(at, (eighths < INNER // 8)[:, None] & column_inside[None, :], 0)
                weight = (words[:, None, :] >> shifts[None, :, None]) & 15
            weight = tl.reshape(weight, (STEP, COLUMNS))
            if ORDERED:  # all of the step in one group
                group = start // GROUP + tl.arange(0, 1)
                group_inside = group * GROUP < INNER
            else:
                group = tl.load(groups_ptr + k, k_inside, 0)
                group_inside = k_inside
            at = zeros_ptr + group[:, None] * (WIDTH // 8) + packed[None, :]
            words = tl.load(at, group_inside[:, None] & (packed < WIDTH // 8)[None, :], 0)
            zero = (words[:, :, None] >> shifts[None, None, :]) & 15
            zero = tl.reshape(zero, (group.shape[0], COLUMNS)) + ZERO_OFFSET
            at = scales_ptr + group[:, None] * WIDTH + columns[None, :]
            scale = tl.load(at, group_inside[:, None] & column_inside[None, :], 0.0)
            at = x_ptr + rows[:, None] * x_stride + k[None, :]
            x = tl.load(at, row_inside[:, None] & k_inside[None, :], 0.0)
            wide = (weight - zero).to(tl.float32) * scale.to(tl.float32)
            part = dot(x, wide.to(x.dtype), part)
        total += part
    store_tile(target_ptr, bias_ptr, total, rows, columns, num_rows, WIDTH, BIAS)


def linear_int4(x: torch.Tensor, weight: Int4Weight, bias: torch.Tensor | None) -> torch.Tensor:
    """As the reference. Raises ValueError for sizes that 8 doesn't divide, or groups that 16
    doesn't."""
    width, inner = weight.shape
    if width % 8 or inner % 8 or weight.group % _SHORTEST_STEP:
        raise ValueError(
            f"linear_int4 takes words of 8 values and groups of a multiple of {_SHORTEST_STEP},"
            f" not {width} x {inner} in groups of {weight.group}"
        )
    tile = tuned("linear_int4", f"{width}x{inner}/{weight.layout}", _TILE)
    step = math.gcd(tile.inner, weight.group)
    splits = num_splits(width, inner, step)
    out = torch.empty((x.shape[0], width), dtype=x.dtype, device=x.device)
    multiply(
        linear_int4_kernel,
        out,
        bias,
        (
            x,
            weight.weight,
            weight.zeros,
            weight.scales,
            weight.zeros if weight.g_idx is None else weight.g_idx,
            x.shape[0],
            x.stride(0),
        ),
        {
            "WIDTH": width,
            "INNER": inner,
            "GROUP": weight.group,
            "STEP": step,
            "STEPS_A_SPLIT": triton.cdiv(triton.cdiv(inner, step), splits),
            "ZERO_OFFSET": weight.zero_offset,
            "AWQ": weight.layout == "awq",
            "ORDERED": weight.g_idx is None,
        },
        tile,
        splits,
    )
    return out
