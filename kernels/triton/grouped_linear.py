"""Products of rows with the weight of each row's own group: experts of a mixture, or adapters.

Shapes: rows [R, K], weights [E, N, K], the group of each row int32[R] (below 0 or from E on: none)
-> [R, N]. Rows are sorted by group on the device and cut into tiles of one group each; as many
programs start as the rows could need, and those without a tile end at once: nothing waits for a
count to reach the host. dtypes: float32, bfloat16, float16; sums are float32. Bytes moved: N K for
each group with rows, 2 R K in, 2 R N out. Operations: 2 R N K.

The sum of a row runs over K in one order, whatever else is in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from headgate.kernels.triton.launch import dot, launch
from headgate.kernels.triton.tuning import LinearTile, tuned

_TILE = LinearTile(rows=32, columns=64, inner=64, warps=4, stages=3)
_SHORTEST_STEP = 16  # of K, for tensor cores
_MOST_EXPERTS = 1024
_ROUTED_AT_ONCE = 256  # logits: 16 bytes of bfloat16 for each thread of a warp


@dataclass(frozen=True, slots=True, eq=False)
class RowTiles:
    """Rows sorted by group, in tiles of one group; made on the device, without waiting for it."""

    order: torch.Tensor  # int32[R]: rows, those of group 0 first; rows of no group at the end
    groups: torch.Tensor  # int32[M]: the group of each tile; E: the tile is not needed
    starts: torch.Tensor  # int32[M]: its first place in `order`
    ends: torch.Tensor  # int32[M]: one after its last
    rows: int  # of a tile

    @classmethod
    def of(cls, row_groups: torch.Tensor, num_groups: int, rows: int) -> RowTiles:
        known = torch.where(
            (row_groups < 0) | (row_groups >= num_groups), num_groups, row_groups
        ).long()
        order = torch.argsort(known, stable=True)
        counts = torch.zeros(num_groups + 1, dtype=torch.int64, device=row_groups.device)
        counts.scatter_add_(0, known, torch.ones_like(known))
        counts = counts[:num_groups]
        tiles = (counts + rows - 1) // rows
        last_tiles, last_rows = tiles.cumsum(0), counts.cumsum(0)
        # Full tiles, and at most one more for each group that has any rows.
        most = len(row_groups) // rows + min(num_groups, len(row_groups))
        numbers = torch.arange(most, device=row_groups.device)
        groups = torch.searchsorted(last_tiles, numbers, right=True)
        inside = groups.clamp(max=max(num_groups - 1, 0))
        first_tiles, first_rows = last_tiles - tiles, last_rows - counts
        starts = first_rows[inside] + (numbers - first_tiles[inside]) * rows
        ends = torch.minimum(starts + rows, last_rows[inside])
        return cls(order.int(), groups.int(), starts.int(), ends.int(), rows)


@triton.jit
def grouped_linear_kernel(
    out_ptr,
    x_ptr,
    weight_ptr,
    row_scales_ptr,
    order_ptr,
    groups_ptr,
    starts_ptr,
    ends_ptr,
    x_stride,
    out_stride,
    NUM_GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    SHARED: tl.constexpr,  # so many rows one after another read the same row of x
    SCALED: tl.constexpr,
    ADD: tl.constexpr,  # to what is in out
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    tile = tl.program_id(0)
    group = tl.load(groups_ptr + tile).to(tl.int64)
    if group >= NUM_GROUPS:
        return
    places = tl.load(starts_ptr + tile) + tl.arange(0, ROWS)
    row_inside = places < tl.load(ends_ptr + tile)
    rows = tl.load(order_ptr + places, row_inside, 0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    column_inside = columns < WIDTH
    weight_row = weight_ptr + (group * WIDTH + columns) * INNER
    x_row = x_ptr + rows // SHARED * x_stride
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, INNER, STEP):
        k = start + tl.arange(0, STEP)
        k_inside = (k < INNER)[None, :]
        x = tl.load(x_row[:, None] + k[None, :], row_inside[:, None] & k_inside, 0.0)
        weight = tl.load(weight_row[:, None] + k[None, :], column_inside[:, None] & k_inside, 0.0)
        total = dot(x, tl.trans(weight.to(x.dtype)), total)
    inside = row_inside[:, None] & column_inside[None, :]
    at = out_ptr + rows[:, None] * out_stride + columns[None, :]
    before = tl.zeros((ROWS, COLUMNS), tl.float32)
    if ADD:
        before = tl.load(at, inside, 0.0).to(tl.float32)
    if SCALED:
        scale = tl.load(row_scales_ptr + rows, row_inside, 0.0).to(tl.float32)
        total = tl.fma(total, scale[:, None] + tl.zeros_like(total), before)
    else:
        total += before
    tl.store(at, total.to(out_ptr.dtype.element_ty), inside)


def tile_of(width: int, inner: int) -> LinearTile:
    """The tile for weights [E, width, inner]; its `rows` are what RowTiles must be made with."""
    return tuned("grouped_linear", f"{width}x{inner}", _TILE)


def grouped_linear(
    x: torch.Tensor,
    weights: torch.Tensor,
    tiles: RowTiles,
    *,
    out: torch.Tensor,
    row_scales: torch.Tensor | None = None,
    add: bool = False,
) -> torch.Tensor:
    """Row r of out[R, N] = row_scales[r] * weights[group of r] times a row of x; rows of no group
    stay as they are.

    x[R / S, K]: each of its rows is read by S rows, one after another. `add`: to what is in `out`.
    """
    num_groups, width, inner = weights.shape
    tile = tile_of(width, inner)
    shared = out.shape[0] // x.shape[0] if x.shape[0] else 1
    launch(
        grouped_linear_kernel,
        (tiles.groups.shape[0], triton.cdiv(width, tile.columns)),
        (
            out,
            x,
            weights,
            out if row_scales is None else row_scales,
            tiles.order,
            tiles.groups,
            tiles.starts,
            tiles.ends,
            x.stride(0),
            out.stride(0),
        ),
        {
            "NUM_GROUPS": num_groups,
            "WIDTH": width,
            "INNER": inner,
            "SHARED": shared,
            "SCALED": row_scales is not None,
            "ADD": add,
            "ROWS": tiles.rows,
            "COLUMNS": tile.columns,
            "STEP": min(tile.inner, max(_SHORTEST_STEP, triton.next_power_of_2(inner))),
        },
        warps=tile.warps,
        stages=tile.stages,
    )
    return out


@triton.jit(do_not_specialize=["num_rows"])
def route_kernel(
    experts_ptr,
    weights_ptr,
    logits_ptr,
    num_rows,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALISE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)[None, :]
    row_inside = (rows < num_rows)[:, None]
    inside = row_inside & (columns < NUM_EXPERTS)
    logits = tl.load(logits_ptr + rows[:, None] * NUM_EXPERTS + columns, inside, 0.0).to(tl.float32)
    logits = tl.where(columns < NUM_EXPERTS, logits, float("-inf"))
    exps = tl.exp(logits - tl.max(logits, 1)[:, None])
    probabilities = exps / tl.sum(exps, 1)[:, None]
    left = tl.where(columns < NUM_EXPERTS, probabilities, -1.0)
    chosen = tl.full((ROWS, COLUMNS), TOP_K, tl.int32)  # in what place each expert came
    total = tl.zeros((ROWS,), tl.float32)
    for place in range(TOP_K):
        best = columns == tl.argmax(left, 1)[:, None]  # the first of equals
        total += tl.max(left, 1)
        chosen = tl.where(best, place, chosen)
        left = tl.where(best, -1.0, left)
    weights = probabilities / total[:, None] if RENORMALISE else probabilities
    at = rows[:, None] * TOP_K + chosen
    here = row_inside & (chosen < TOP_K)
    tl.store(experts_ptr + at, columns + tl.zeros_like(chosen), here)
    tl.store(weights_ptr + at, weights, here)


def route(logits: torch.Tensor, top_k: int, renormalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """As the reference. Raises ValueError beyond 1024 experts, or for fewer than `top_k`."""
    rows, num_experts = logits.shape
    if not 0 < top_k <= num_experts <= _MOST_EXPERTS:
        raise ValueError(f"route takes 1 to {_MOST_EXPERTS} experts, not {top_k} of {num_experts}")
    experts = torch.empty((rows, top_k), dtype=torch.int32, device=logits.device)
    weights = torch.empty((rows, top_k), dtype=torch.float32, device=logits.device)
    columns = triton.next_power_of_2(num_experts)
    at_once = max(1, _ROUTED_AT_ONCE // columns)
    launch(
        route_kernel,
        (triton.cdiv(rows, at_once),),
        (experts, weights, logits.contiguous(), rows),
        {
            "NUM_EXPERTS": num_experts,
            "TOP_K": top_k,
            "RENORMALISE": renormalise,
            "ROWS": at_once,
            "COLUMNS": columns,
        },
        warps=1,
    )
    return experts, weights
