"""Low-rank adapters, each row its own: y += scaling * B (A x), with many adapters in one batch.

Shapes: x[T, K], slots int32[T] (below 0: no adapter), A [S, r, K], B [S, N, r], scaling float32[S]
(Hu et al., "LoRA", 2021; one product for all adapters as in Chen et al., "Punica", 2023). Adapters
of smaller ranks are filled up with zeros. Bytes moved: r (K + N) for each adapter with rows, and
the rows. Operations: 2 T r (K + N), two grouped products over rows sorted by adapter.
"""

from __future__ import annotations

import torch

from headgate.kernels.triton.grouped_linear import RowTiles, grouped_linear, tile_of


def add_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    slots: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: torch.Tensor,
) -> torch.Tensor:
    """y[T, N], to which each row's adapter has been added in place; rows of none stay as they are.

    Between the two products the r values of a row have the dtype of x.
    """
    num_slots, rank, _ = a.shape
    tiles = RowTiles.of(slots, num_slots, tile_of(*a.shape[1:]).rows)
    low = torch.empty((x.shape[0], rank), dtype=x.dtype, device=x.device)
    grouped_linear(x, a, tiles, out=low)
    if tile_of(*b.shape[1:]).rows != tiles.rows:
        tiles = RowTiles.of(slots, num_slots, tile_of(*b.shape[1:]).rows)
    row_scales = scaling[slots.clamp(min=0).long()]
    return grouped_linear(low, b, tiles, out=y, row_scales=row_scales, add=True)
