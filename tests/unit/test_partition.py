"""Any model over any number of shards: everything is covered once, and the work is even."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headgate.shard.errors import ModelError
from headgate.shard.model_config import ModelConfig, parse_model_config
from headgate.shard.partition import Help, Partition, make_partition, split_evenly


def config(
    heads: int,
    groups: int,
    *,
    hidden: int = 576,
    intermediate: int = 1536,
    vocab: int = 49152,
    layers: int = 30,
    head_dim: int = 64,
) -> ModelConfig:
    return parse_model_config(
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": vocab,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": groups,
            "head_dim": head_dim,
        },
        {},
    )


def assert_covers(ranges: tuple[range, ...], total: int) -> None:
    assert ranges[0].start == 0 and ranges[-1].stop == total
    assert all(left.stop == right.start for left, right in pairwise(ranges))
    assert all(len(part) > 0 for part in ranges)


def test_nine_heads_in_three_groups_over_two() -> None:
    model = config(9, 3)
    cut = make_partition(model, 2)
    assert cut.heads == (range(6), range(6, 9))
    assert cut.kv_heads == (range(2), range(2, 3))
    assert cut.mlp_columns == (range(768), range(768, 1536))
    assert cut.vocabulary == (range(24576), range(24576, 49152))


def test_help_evens_out_nine_heads_over_two() -> None:
    """Queries, keys and values of 640 and 320 columns, and the output's 384 and 192 rows: 1024 and
    512, of which each takes 768."""
    assert make_partition(config(9, 3), 2).helped == (None, None)
    cut = make_partition(config(9, 3), 2, helping=True)
    assert cut.helped == (Help(helper=1, columns=256), None)


def test_a_rank_helps_several() -> None:
    cut = make_partition(config(5, 5), 3, helping=True)
    assert cut.helped == (Help(2, 64), Help(2, 64), None)


def test_no_help_that_costs_more_than_it_saves() -> None:
    assert make_partition(config(9, 3, intermediate=60_000), 2, helping=True).helped == (None, None)
    assert make_partition(config(12, 4), 2, helping=True).helped == (None, None)


def test_more_ranks_than_groups_share_key_value_heads() -> None:
    cut = make_partition(config(9, 3), 4)
    assert cut.heads == (range(2), range(2, 3), range(3, 6), range(6, 9))
    assert cut.kv_heads == (range(1), range(1), range(1, 2), range(2, 3))


def test_one_rank_has_everything() -> None:
    model = config(9, 3)
    cut = make_partition(model, 1)
    assert (cut.heads, cut.kv_heads) == ((range(9),), (range(3),))
    assert (cut.mlp_columns, cut.vocabulary) == ((range(1536),), (range(49152),))


@given(
    groups=st.integers(1, 8),
    per_group=st.integers(1, 8),
    data=st.data(),
    intermediate=st.integers(64, 3000),
    vocab=st.integers(64, 60000),
)
def test_any_world_size(
    groups: int, per_group: int, data: st.DataObject, intermediate: int, vocab: int
) -> None:
    model = config(groups * per_group, groups, intermediate=intermediate, vocab=vocab, head_dim=16)
    world_size = data.draw(st.integers(1, model.num_heads))
    cut = make_partition(model, world_size)
    assert_covers(cut.heads, model.num_heads)
    assert_covers(cut.mlp_columns, intermediate)
    assert_covers(cut.vocabulary, vocab)
    for heads, kv_heads in zip(cut.heads, cut.kv_heads, strict=True):
        assert {head // per_group for head in heads} == set(kv_heads)
        assert len(heads) % len(kv_heads) == 0
    check_help(make_partition(model, world_size, helping=True), model)
    for ranges, total in ((cut.mlp_columns, intermediate), (cut.vocabulary, vocab)):
        sizes = [len(part) for part in ranges]
        # The difference is a tile, which is at most a sixteenth of a share.
        assert max(sizes) - min(sizes) <= max(1, total // world_size // 16)


def check_help(cut: Partition, model: ModelConfig) -> None:
    dim = model.head_dim
    qkv = [(len(q) + 2 * len(k)) * dim for q, k in zip(cut.heads, cut.kv_heads, strict=True)]
    before = [columns + len(q) * dim for columns, q in zip(qkv, cut.heads, strict=True)]
    after = list(before)
    for rank, help in enumerate(cut.helped):
        if help is None:
            continue
        assert cut.helped[help.helper] is None, "nobody both gets and gives"
        assert 0 < help.columns <= qkv[rank] / 2
        after[rank] -= help.columns
        after[help.helper] += help.columns
    assert max(after) <= max(before)
    even = sum(before) / len(before)
    assert all(own <= even for own, was in zip(after, before, strict=True) if own > was)


@pytest.mark.parametrize("world_size", [0, 10, -1])
def test_world_sizes_that_do_not_fit(world_size: int) -> None:
    with pytest.raises(ModelError, match=r"9 attention heads.*not"):
        make_partition(config(9, 3), world_size)


def test_too_few_columns() -> None:
    with pytest.raises(ModelError, match="3 MLP columns cannot be split over 4 shards"):
        make_partition(config(4, 4, intermediate=3), 4)


def test_split_evenly() -> None:
    assert split_evenly(7, 3) == [range(3), range(3, 5), range(5, 7)]
