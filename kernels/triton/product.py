"""What the matrix products share: sums over K cut at fixed places, so that few rows fill a GPU.

A product of few rows has too few tiles for a GPU's processors; the sum over K must be shared out as
well. Here K is cut into splits at places that depend on the weight's shape only. Each split is
summed from zero and the splits are added in ascending order: by one program after another, or by
programs side by side that write their sums for `add_splits` to add. Both give the same bits, so
that the number of rows may choose between them and a row's result never depends on it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from headgate.kernels.triton.launch import launch
from headgate.kernels.triton.tuning import LinearTile

_ENOUGH_PROGRAMS = 264  # two for each processor of an H100
_SHORTEST_SPLIT = 1024  # of K: a shorter one costs more to add than it saves
_MOST_SPLITS = 8
_COLUMNS = 64  # of the tiles that the parts of a sum are meant for
_ADDED_AT_ONCE = 1024


def num_splits(width: int, inner: int, step: int) -> int:
    """Into how many parts the sum of a weight [width, inner] is cut, each some `step`s of K long.

    As many as give every processor something to do where there is one tile of rows. No tile has a
    part in it.
    """
    wanted = triton.cdiv(_ENOUGH_PROGRAMS, triton.cdiv(width, _COLUMNS))
    steps = triton.cdiv(inner, step)
    most = max(1, min(_MOST_SPLITS, inner // _SHORTEST_SPLIT, steps))
    splits = min(wanted, most)
    return triton.cdiv(steps, triton.cdiv(steps, splits))  # none is empty


def multiply(
    kernel: Any,
    out: torch.Tensor,
    bias: torch.Tensor | None,
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
    tile: LinearTile,
    splits: int,
) -> None:
    """Runs `kernel` on all tiles of out[T, N], with the splits in one program or side by side.

    The kernel takes (target, bias, *arguments) and, beside `constants`, SPLITS, SERIAL, BIAS, ROWS
    and COLUMNS; program ids: tile of rows, tile of columns, split.
    """
    rows, width = out.shape
    tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(width, tile.columns)
    serial = splits == 1 or tiles >= _ENOUGH_PROGRAMS
    target = out
    if not serial:
        target = torch.empty((splits, rows, width), dtype=torch.float32, device=out.device)
    launch(
        kernel,
        (triton.cdiv(rows, tile.rows), triton.cdiv(width, tile.columns), 1 if serial else splits),
        (target, out if bias is None else bias, *arguments),
        {
            **constants,
            "SPLITS": splits,
            "SERIAL": serial,
            "BIAS": serial and bias is not None,
            "ROWS": tile.rows,
            "COLUMNS": tile.columns,
        },
        warps=tile.warps,
        stages=tile.stages,
    )
    if not serial:
        _add_splits(out, target, bias)


@triton.jit
def store_tile(
    target_ptr, bias_ptr, total, rows, columns, num_rows, WIDTH: tl.constexpr, BIAS: tl.constexpr
):
    """A tile of sums into target[.., num_rows, WIDTH], of this program's split where there are
    several side by side."""
    inside = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
    if BIAS:
        total += tl.load(bias_ptr + columns, columns < WIDTH, 0.0).to(tl.float32)[None, :]
    at = (tl.program_id(2).to(tl.int64) * num_rows + rows)[:, None] * WIDTH + columns[None, :]
    tl.store(target_ptr + at, total.to(target_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["num_rows"])
def add_splits_kernel(
    out_ptr,
    parts_ptr,
    bias_ptr,
    num_rows,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(SPLITS):
        total += tl.load(parts_ptr + (split * num_rows + row) * WIDTH + columns, inside, 0.0)
    if BIAS:
        total += tl.load(bias_ptr + columns, inside, 0.0).to(tl.float32)
    tl.store(out_ptr + row * WIDTH + columns, total.to(out_ptr.dtype.element_ty), inside)


def _add_splits(out: torch.Tensor, parts: torch.Tensor, bias: torch.Tensor | None) -> None:
    rows, width = out.shape
    launch(
        add_splits_kernel,
        (rows, triton.cdiv(width, _ADDED_AT_ONCE)),
        (out, parts, out if bias is None else bias, rows),
        {
            "WIDTH": width,
            "SPLITS": parts.shape[0],
            "BIAS": bias is not None,
            "BLOCK": _ADDED_AT_ONCE,
        },
        warps=4,
    )
