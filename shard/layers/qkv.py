"""Queries, keys and values of this rank's heads, some of which another rank may multiply."""

from __future__ import annotations

import torch

from headgate.shard.layers.linear import ColumnLinear
from headgate.shard.layers.norm import RMSNorm
from headgate.shard.load_context import LoadContext
from headgate.shard.weights import Fused

Cuts = tuple[tuple[int, range], ...]  # as Fused's: 0 is queries, 1 keys, 2 values


class QkvLinear:
    """ColumnLinear of what attention takes. `prefix`: the attention's name.

    Where heads do not come out even, ranks with fewer help those with more (Partition.helped). What
    a helper makes for others it makes first, so that they need not wait for it.
    """

    def __init__(self, context: LoadContext, prefix: str, bias: bool) -> None:
        self._group, self._helped = context.group, context.helped
        self._own = ColumnLinear.fused(context, prefix, _fused(context, _kept(context)), bias)
        self._for_others: ColumnLinear | None = None
        if given := _given(context):
            self._for_others = ColumnLinear.fused(context, prefix, _fused(context, given), bias)

    def after_norm(
        self, norm: RMSNorm, x: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As ColumnLinear's: the columns are queries of all heads, keys, values."""
        if self._for_others is not None:
            made, x = self._for_others.after_norm(norm, x, residual)
            self._group.hand_over(self._helped, made)
            return self._own.after_norm(norm, x, None)
        own, residual = self._own.after_norm(norm, x, residual)
        return self._group.hand_over(self._helped, own) if any(self._helped) else own, residual


def _fused(context: LoadContext, cuts: Cuts) -> Fused:
    config, dim = context.config, context.config.head_dim
    kv_size = config.num_kv_heads * dim
    return Fused(
        parts=("q_proj", "k_proj", "v_proj"),
        whole="qkv_proj",
        sizes=(config.num_heads * dim, kv_size, kv_size),
        cuts=cuts,
    )


def _kept(context: LoadContext) -> Cuts:
    """What this rank multiplies of its own."""
    return _split(context, context.group.rank)[0]


def _given(context: LoadContext) -> Cuts:
    """What it multiplies for others, by rank."""
    return tuple(
        cut
        for rank, help in enumerate(context.helped)
        if help and help.helper == context.group.rank
        for cut in _split(context, rank)[1]
    )


def _split(context: LoadContext, rank: int) -> tuple[Cuts, Cuts]:
    """The columns of a rank's heads: those that it multiplies, those that its helper does."""
    dim, partition, help = context.config.head_dim, context.partition, context.helped[rank]
    parts = (partition.heads[rank], partition.kv_heads[rank], partition.kv_heads[rank])
    left = sum(map(len, parts)) * dim - (help.columns if help else 0)
    first, others = [], []
    for part, held in enumerate(parts):
        columns = range(held.start * dim, held.stop * dim)
        first.append((part, columns[:left]))
        others.append((part, columns[left:]))
        left -= len(first[-1][1])
    return tuple(first), tuple(others)
