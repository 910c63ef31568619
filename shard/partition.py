"""Partition: which heads, MLP columns and vocabulary rows each rank of a group holds.

Pure arithmetic, the same on every rank, for any number of shards from one to the number of
attention heads. It knows no tensors; Weights reads the slices it names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headgate.shard.errors import ModelError
from headgate.shard.model_config import ModelConfig

# Cuts fall on multiples of this where the sizes allow: whole vectors for the matrix kernels.
_TILE = 16
# A tile coarser than this part of an even share would spoil the balance.
_TILES_PER_RANK = 8


@dataclass(frozen=True, slots=True)
class Partition:
    """One range for each rank, in rank order; together they cover all query heads, columns and ids.

    A key/value head is on several ranks where the query heads of its group are spread over them.
    """

    heads: tuple[range, ...]
    kv_heads: tuple[range, ...]
    mlp_columns: tuple[range, ...]
    vocabulary: tuple[range, ...]


def make_partition(config: ModelConfig, world_size: int) -> Partition:
    """Divides the model so that every rank has about the same number of weights to multiply with.

    Attention is cut by whole key/value groups, or, with more ranks than groups, each group's query
    heads are spread over ranks of its own. Those shares are uneven where they don't divide; the
    MLP's columns, then the vocabulary, make up for it. Raises ModelError for a `world_size` that
    does not fit.
    """
    if not 1 <= world_size <= config.num_heads:
        raise ModelError(
            f"this model has {config.num_heads} attention heads, so it can be split over 1 to "
            f"{config.num_heads} shards, not {world_size}"
        )
    heads, kv_heads = _split_heads(config, world_size)
    # Work is counted in weights, all of them rows or columns of hidden_size.
    attention = [
        2 * config.head_dim * (len(q) + len(kv)) for q, kv in zip(heads, kv_heads, strict=True)
    ]
    columns = _even_out(attention, config.intermediate_size, 3, "MLP columns")
    layers = [
        config.num_layers * (work + 3 * len(cut))
        for work, cut in zip(attention, columns, strict=True)
    ]
    vocabulary = _even_out(layers, config.vocab_size, 1, "vocabulary entries")
    return Partition(heads, kv_heads, columns, vocabulary)


def _split_heads(
    config: ModelConfig, world_size: int
) -> tuple[tuple[range, ...], tuple[range, ...]]:
    groups, per_group = config.num_kv_heads, config.heads_per_group
    if world_size <= groups:
        kv_heads = split_evenly(groups, world_size)
        heads = [range(kv.start * per_group, kv.stop * per_group) for kv in kv_heads]
        return tuple(heads), tuple(kv_heads)
    heads, kv_heads = [], []
    for group, ranks in enumerate(split_evenly(world_size, groups)):
        for part in split_evenly(per_group, len(ranks)):
            start = group * per_group
            heads.append(range(start + part.start, start + part.stop))
            kv_heads.append(range(group, group + 1))
    return tuple(heads), tuple(kv_heads)


def split_evenly(total: int, parts: int) -> list[range]:
    """`total` things in `parts` consecutive ranges; sizes differ by at most one, larger first."""
    share, larger = divmod(total, parts)
    return _consecutive([share + (index < larger) for index in range(parts)])


def _even_out(work: Sequence[int], units: int, cost: int, what: str) -> tuple[range, ...]:
    """Gives every rank part of `units`, each `cost` work, so that the totals come out even.

    Every rank gets at least one tile: kernels need not cope with empty matrices.
    """
    ranks = len(work)
    if units < ranks:
        raise ModelError(f"{units} {what} cannot be split over {ranks} shards")
    tile = _TILE
    while tile > 1 and (units % tile or units < tile * _TILES_PER_RANK * ranks):
        tile //= 2
    tiles = units // tile
    counts = [1] * ranks
    # Water-filling: raise the lowest ranks to a common level, then hand out what rounding left.
    level = _level([w + tile * cost for w in work], (tiles - ranks) * tile * cost)
    for rank in range(ranks):
        spare = level - work[rank] - tile * cost
        counts[rank] += max(0, spare // (tile * cost))
    for _ in range(tiles - sum(counts)):
        lowest = min(range(ranks), key=lambda rank: (work[rank] + counts[rank] * tile * cost, rank))
        counts[lowest] += 1
    return tuple(_consecutive([count * tile for count in counts]))


def _level(heights: Sequence[int], volume: int) -> int:
    """The common height that `volume` fills the lowest of `heights` up to, rounded down."""
    ordered = sorted(heights)
    for count in range(1, len(ordered) + 1):
        level = (sum(ordered[:count]) + volume) // count
        if count == len(ordered) or level <= ordered[count]:
            return level
    raise AssertionError("no heights")


def _consecutive(sizes: Sequence[int]) -> list[range]:
    ranges, start = [], 0
    for size in sizes:
        ranges.append(range(start, start + size))
        start += size
    return ranges
