"""A mixture of experts' MLP: rows to their experts, two grouped products, weighted sums.

Shapes: x[T, H], experts int32[T, k] and weights float32[T, k] (of `route`), gate_up [E, 2I, H],
down [E, H, I] -> [T, H] (Shazeer et al., "Outrageously large neural networks", 2017). Between the
products lies the gate of gated.py. A token's experts are added in the order of `experts`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from headgate.kernels.triton.gated import silu_and_mul
from headgate.kernels.triton.grouped_linear import RowTiles, grouped_linear, tile_of
from headgate.kernels.triton.launch import launch

_BLOCK = 1024


@triton.jit
def combine_kernel(
    out_ptr, parts_ptr, WIDTH: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    total = tl.zeros((BLOCK,), tl.float32)
    for place in range(TOP_K):
        at = parts_ptr + (row * TOP_K + place) * WIDTH + columns
        total += tl.load(at, inside, 0.0).to(tl.float32)
    tl.store(out_ptr + row * WIDTH + columns, total.to(out_ptr.dtype.element_ty), inside)


def moe_mlp(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
) -> torch.Tensor:
    """Sum over a token's experts of weight * down(silu(gate) * up). An expert outside 0..E-1
    (another rank's) adds nothing."""
    rows, top_k = experts.shape
    width = x.shape[1]
    flat = experts.flatten()
    tiles = RowTiles.of(flat, gate_up.shape[0], tile_of(*gate_up.shape[1:]).rows)
    hidden = x.new_empty((rows * top_k, gate_up.shape[1]))
    grouped_linear(x, gate_up, tiles, out=hidden)
    if tile_of(*down.shape[1:]).rows != tiles.rows:
        tiles = RowTiles.of(flat, down.shape[0], tile_of(*down.shape[1:]).rows)
    parts = torch.zeros((rows * top_k, width), dtype=torch.float32, device=x.device)
    grouped_linear(silu_and_mul(hidden), down, tiles, out=parts, row_scales=weights.flatten())
    out = torch.empty_like(x)
    launch(
        combine_kernel,
        (rows, triton.cdiv(width, _BLOCK)),
        (out, parts),
        {"WIDTH": width, "TOP_K": top_k, "BLOCK": _BLOCK},
        warps=4,
    )
    return out
