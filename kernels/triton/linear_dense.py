"""Products of weights as they are, of which a row's bits don't depend on the rows beside it.

Used with `--batch-invariant`; otherwise cuBLAS multiplies (linear.py).

Shapes: x[T, K] -> [T, N] for a weight [N, K]. dtypes: float32, bfloat16, float16 in and out; sums
are float32. Bytes moved: 2 N K, 2 T K of inputs once per tile of columns and 2 T N of results.
Operations: 2 T N K, on tensor cores but for float32.

What it costs: one tile for every number of rows, where cuBLAS has one for each. Few rows are bound
by the reading of the weight, which is the same; of many rows (prompts) a tile of 64 x 128 keeps the
tensor cores less busy than the larger ones that cuBLAS takes. `make bench-gpu` measures both.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from headgate.kernels.reference import RoundedTensor
from headgate.kernels.triton import linear as plain
from headgate.kernels.triton.launch import dot
from headgate.kernels.triton.packed_weight import PackedQuantised
from headgate.kernels.triton.product import multiply, num_splits, store_tile
from headgate.kernels.triton.tuning import LinearTile, tuned

_TILE = LinearTile(rows=64, columns=128, inner=64, warps=4, stages=3)
_TILE_FLOAT32 = LinearTile(rows=32, columns=64, inner=32, warps=4, stages=2)  # no tensor cores


@triton.jit(do_not_specialize=["num_rows"])
def linear_dense_kernel(
    target_ptr,
    bias_ptr,
    x_ptr,
    weight_ptr,
    num_rows,
    x_stride,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    STEP: tl.constexpr,
    STEPS_A_SPLIT: tl.constexpr,
    SPLITS: tl.constexpr,
    SERIAL: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    row_inside, column_inside = rows < num_rows, columns < WIDTH
    ks = tl.arange(0, STEP)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    first = 0 if SERIAL else tl.program_id(2)
    for split in range(first, SPLITS if SERIAL else first + 1):
        part = tl.zeros((ROWS, COLUMNS), tl.float32)
        for step in range(split * STEPS_A_SPLIT, (split + 1) * STEPS_A_SPLIT):
            k = step * STEP + ks
            inside = (k < INNER)[None, :]
            at = columns[:, None] * INNER + k[None, :]
            weight = tl.load(weight_ptr + at, column_inside[:, None] & inside, 0.0)
            at = rows[:, None] * x_stride + k[None, :]
            x = tl.load(x_ptr + at, row_inside[:, None] & inside, 0.0)
            part = dot(x, tl.trans(weight.to(x.dtype)), part)
        total += part
    store_tile(target_ptr, bias_ptr, total, rows, columns, num_rows, WIDTH, BIAS)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor | PackedQuantised | RoundedTensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """As the reference."""
    if isinstance(weight, PackedQuantised):  # whose products never depend on the batch
        return plain.linear(x, weight, bias)
    if isinstance(weight, RoundedTensor):
        x, weight = x.bfloat16().float(), weight.weight
    lines = x if x.dim() == 2 and x.stride(-1) == 1 else x.reshape(-1, x.shape[-1])
    return _linear(lines, weight.contiguous(), bias).view(*x.shape[:-1], weight.shape[0])


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    width, inner = weight.shape
    default = _TILE_FLOAT32 if x.dtype == torch.float32 else _TILE
    tile = tuned("linear_dense", f"{width}x{inner}/{x.dtype}".replace("torch.", ""), default)
    splits = num_splits(width, inner, tile.inner)
    out = torch.empty((x.shape[0], width), dtype=x.dtype, device=x.device)
    multiply(
        linear_dense_kernel,
        out,
        bias,
        (x, weight, x.shape[0], x.stride(0)),
        {
            "WIDTH": width,
            "INNER": inner,
            "STEP": tile.inner,
            "STEPS_A_SPLIT": triton.cdiv(triton.cdiv(inner, tile.inner), splits),
        },
        tile,
        splits,
    )
    return out
