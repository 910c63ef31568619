"""Products of weights in 8 or 4 bits with inputs as they are.

Shapes: x[T, K] -> [T, N] for a weight of N rows (columns of the result), in groups of S along K
with a scale, in 4 bits a minimum too, as `headgate.kernels.quantised` defines int8-weight-only and
int4. (The reference quantises the inputs of int4, since processors without tensor cores multiply
whole numbers faster. Here that would take more time than it saves.) dtypes: float32, bfloat16,
float16 in and out; weights are widened to that of the inputs, sums are float32. Bytes moved: N K (8
bits) or N K / 2 (4 bits), the scales, 2 T K of inputs and 2 T N of results. Operations: 2 T N K on
tensor cores, and about 4 N K to widen, once for each tile of rows.

A row's bits don't depend on the rows beside it: see product.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from headgate.kernels.triton.launch import dot
from headgate.kernels.triton.packed_weight import PackedQuantised
from headgate.kernels.triton.product import multiply, num_splits, store_tile
from headgate.kernels.triton.tuning import MANY, LinearTile, tile_for, tuned

# They don't change a row's bits where all multiply by one instruction, which sums a row's products
# in one order whatever the tile; `make test-gpu` compares them. The fastest on an H100; other chips
# have not been measured. A pair of groups is multiplied at a time, whatever `inner`.
_TILES = {
    "sm_90": {
        64: LinearTile(rows=64, columns=128, inner=64, warps=4, stages=3),
        MANY: LinearTile(rows=128, columns=64, inner=64, warps=4, stages=3),
    },
    "": {MANY: LinearTile(rows=64, columns=64, inner=64, warps=4, stages=2)},
}


@triton.jit
def _low(words):
    """The bfloat16 in the low half of each word, as float32."""
    return (words << 16).to(tl.float32, bitcast=True)


@triton.jit
def _high(words):
    return (words & -65536).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["num_rows"])
def linear_weight_only_kernel(
    target_ptr,
    bias_ptr,
    x_ptr,
    weight_ptr,
    scales_ptr,
    num_rows,
    x_stride,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
    NIBBLES: tl.constexpr,
    PAIRS_A_SPLIT: tl.constexpr,  # of groups
    SPLITS: tl.constexpr,
    SERIAL: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # The weight's columns are the tall side of the tensor cores' tiles, so that what becomes of
    # narrow weights goes to them from registers.
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    row_inside, column_inside = rows < num_rows, columns < WIDTH
    ks = tl.arange(0, GROUP)
    pairs: tl.constexpr = (INNER + 2 * GROUP - 1) // (2 * GROUP)
    total = tl.zeros((COLUMNS, ROWS), tl.float32)
    first = 0 if SERIAL else tl.program_id(2)
    for split in range(first, SPLITS if SERIAL else first + 1):
        part = tl.zeros((COLUMNS, ROWS), tl.float32)
        last_pair = min((split + 1) * PAIRS_A_SPLIT, pairs)
        for pair in range(split * PAIRS_A_SPLIT, last_pair):
            for odd in tl.static_range(2):
                group = pair * 2 + odd
                # In 8 bits a pair has one row of words for its groups, in 4 bits two.
                block = pair if NIBBLES else group
                if not NIBBLES or odd == 0:
                    block_ptr = weight_ptr + tl.cast(block, tl.int64) * (WIDTH * GROUP)
                    at = columns[:, None] * GROUP + ks[None, :]
                    packed = tl.load(block_ptr + at, column_inside[:, None], 0)
                if NIBBLES or odd == 0:
                    at = (group if NIBBLES else pair) * WIDTH + columns
                    words = tl.load(scales_ptr + at, column_inside, 0)[:, None]
                if NIBBLES:
                    values = (packed >> 4 if odd else packed & 15).to(tl.float32)
                    scale, minimum = _low(words), _high(words)
                    nothing = tl.zeros_like(values)
                    wide = tl.fma(values, scale + nothing, minimum + nothing)
                else:
                    wide = packed.to(tl.float32) * (_high(words) if odd else _low(words))
                k = group * GROUP + ks
                inside = row_inside[:, None] & (k < INNER)[None, :]
                x = tl.load(x_ptr + rows[:, None] * x_stride + k[None, :], inside, 0)
                part = dot(wide.to(x.dtype), tl.trans(x), part)
        total += part
    store_tile(target_ptr, bias_ptr, tl.trans(total), rows, columns, num_rows, WIDTH, BIAS)


def linear_weight_only(
    x: torch.Tensor, weight: PackedQuantised, bias: torch.Tensor | None
) -> torch.Tensor:
    """x[T, K] times the weight, widened; the result has the dtype of x."""
    kind, (width, inner) = weight.kind, weight.shape
    size, default = tile_for(x.shape[0], _TILES)
    tile = tuned("linear_weight_only", f"{width}x{inner}/{kind.name}/{size}", default)
    pair = 2 * kind.group
    splits = num_splits(width, inner, pair)
    out = torch.empty((x.shape[0], width), dtype=x.dtype, device=x.device)
    multiply(
        linear_weight_only_kernel,
        out,
        bias,
        (x, weight.values, weight.scales, x.shape[0], x.stride(0)),
        {
            "WIDTH": width,
            "INNER": inner,
            "GROUP": kind.group,
            "NIBBLES": kind.offset,
            "PAIRS_A_SPLIT": triton.cdiv(triton.cdiv(inner, pair), splits),
        },
        tile,
        splits,
    )
    return out
