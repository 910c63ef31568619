"""Partition: which heads, MLP columns and vocabulary rows each rank of a group holds, and who
multiplies with more than its own.

Pure arithmetic, the same on every rank, for any number of shards from one to the number of
attention heads. It knows no tensors; Weights reads the slices it names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headgate.shard.errors import ModelError
from headgate.shard.model_config import ModelConfig

# Cuts fall on multiples of this where the sizes allow: whole groups of quantised weights, and whole
# vectors for the matrix kernels.
_TILE = 64
# A tile coarser than this part of an even share would spoil the balance.
_TILES_PER_RANK = 16
# Columns are multiplied in panels of so many.
_PANEL = 32
# Help must save this part of a layer's products: it costs a meeting, and inputs laid out twice.
_WORTH_HELPING = 0.02


@dataclass(frozen=True, slots=True)
class Help:
    """The last `columns` of a rank's queries, keys and values are multiplied by rank `helper`."""

    helper: int
    columns: int


@dataclass(frozen=True, slots=True)
class Partition:
    """One range for each rank, in rank order; together they cover all query heads, columns and ids.

    A key/value head is on several ranks where the query heads of its group are spread over them.
    `helped`: by rank, the help it gets. No rank both gets and gives.
    """

    heads: tuple[range, ...]
    kv_heads: tuple[range, ...]
    mlp_columns: tuple[range, ...]
    vocabulary: tuple[range, ...]
    helped: tuple[Help | None, ...]


def make_partition(config: ModelConfig, world_size: int, *, helping: bool = False) -> Partition:
    """Divides each layer's two parts, and the vocabulary, as evenly as they can be.

    The ranks meet after attention and again after the MLP, so each part takes as long as its
    slowest rank: columns of the MLP cannot make up for uneven heads. Attention is cut by whole
    key/value groups, or, with more ranks than groups, each group's query heads are spread over
    ranks of its own. `helping`: the ranks can hand each other over what they multiplied
    (Group.hands_over), so those with fewer heads help those with more.
    Raises ModelError for a `world_size` that does not fit.
    """
    if not 1 <= world_size <= config.num_heads:
        raise ModelError(
            f"this model has {config.num_heads} attention heads, so it can be split over 1 to "
            f"{config.num_heads} shards, not {world_size}"
        )
    heads, kv_heads = _split_heads(config, world_size)
    columns = _split_tiles(config.intermediate_size, world_size, "MLP columns")
    vocabulary = _split_tiles(config.vocab_size, world_size, "vocabulary entries")
    helped = _find_help(config, heads, kv_heads) if helping else (None,) * world_size
    return Partition(heads, kv_heads, columns, vocabulary, helped)


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


def _find_help(
    config: ModelConfig, heads: Sequence[range], kv_heads: Sequence[range]
) -> tuple[Help | None, ...]:
    """Evens out attention's weights, not its heads: for few rows or short contexts they are most of
    its cost. A rank gives away at most half of its queries, keys and values, so that what it is
    given is there before it is done with its own."""
    ranks, dim = range(len(heads)), config.head_dim
    qkv = [(len(q) + 2 * len(kv)) * dim for q, kv in zip(heads, kv_heads, strict=True)]
    work = [columns + len(q) * dim for columns, q in zip(qkv, heads, strict=True)]  # with output's
    even = sum(work) / len(ranks)
    worth = _WORTH_HELPING * (even + 3 * config.intermediate_size / len(ranks))
    room = [even - own for own in work]
    helped: list[Help | None] = [None] * len(ranks)
    for rank in sorted(ranks, key=lambda rank: room[rank]):
        helper = max(ranks, key=lambda rank: room[rank])
        columns = min(-room[rank], room[helper], qkv[rank] / 2) // _PANEL * _PANEL
        if columns < max(worth, _PANEL):
            break
        helped[rank] = Help(helper, int(columns))
        room[helper] -= columns
    return tuple(helped)


def split_evenly(total: int, parts: int) -> list[range]:
    """`total` things in `parts` consecutive ranges; sizes differ by at most one, larger first."""
    share, larger = divmod(total, parts)
    return _consecutive([share + (index < larger) for index in range(parts)])


def _split_tiles(total: int, parts: int, what: str) -> tuple[range, ...]:
    """`total` things in consecutive ranges of whole tiles.

    Every rank gets at least one thing: kernels need not cope with empty matrices.
    """
    if total < parts:
        raise ModelError(f"{total} {what} cannot be split over {parts} shards")
    tile = _TILE
    while tile > 1 and (total % tile or total < tile * _TILES_PER_RANK * parts):
        tile //= 2
    return tuple(
        range(cut.start * tile, cut.stop * tile) for cut in split_evenly(total // tile, parts)
    )


def _consecutive(sizes: Sequence[int]) -> list[range]:
    ranges, start = [], 0
    for size in sizes:
        ranges.append(range(start, start + size))
        start += size
    return ranges
