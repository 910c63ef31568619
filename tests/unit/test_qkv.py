"""Shards that help each other with queries, keys and values: the bits of those that don't."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from headgate.proto.messages import NewRow, RowSampling, StepPlan
from headgate.shard.config import ShardIdentity
from headgate.shard.distributed import SharedMemoryGroup
from headgate.shard.model_runner import ModelRunner
from headgate.shard.models.registry import load_model
from tests.checkpoints import make_checkpoint
from tests.unit.fake_model import shard_config
from tests.unit.shard_threads import groups_of_threads

PROMPT = list(b"the quick brown fox")


@pytest.fixture(autouse=True)
def all_by_cpp(cpu_kernels: None) -> None:
    """All tests here."""


@pytest.fixture(scope="module")
def biased_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """9 heads in 3 groups, with biases."""
    return make_checkpoint(tmp_path_factory.mktemp("biased"), attention_bias=True)


def answers(
    path: Path, world_size: int, quantize: str, helping: bool, recorded: bool
) -> tuple[list[object], list[int]]:
    """Rank 0's tokens and logprobs, and the columns that each rank multiplies in a layer."""

    def of(group: SharedMemoryGroup) -> tuple[list[object], int]:
        group.hands_over = helping
        model = load_model(path, dtype="bfloat16", device="cpu", group=group, quantize=quantize)
        identity = ShardIdentity(group.rank, world_size, epoch=1)
        runner = ModelRunner(model, group, shard_config(), identity)
        if recorded:
            runner.record()
            assert runner.recorded is not None
        runner.allocate(20)
        sampling = RowSampling(12, ignore_eos=True, logprobs=True)
        row = NewRow(0, PROMPT, sampling, block_ids=range(20))
        plans = [{"new_rows": [row], "rows": [0], "counts": [len(PROMPT)]}]
        plans += [{"rows": [0], "counts": [1]}] * 8
        results = [
            runner.step(StepPlan(epoch=1, sequence=number, **plan))  # type: ignore[arg-type]
            for number, plan in enumerate(plans, 1)
        ]
        qkv = model.layers[0].attention._qkv
        columns = qkv._own.weight.columns
        if qkv._for_others is not None:
            columns += qkv._for_others.weight.columns
        return [(list(r.token_ids), list(r.logprobs)) for r in results], columns

    with ThreadPoolExecutor(world_size) as pool:
        ranks = list(pool.map(of, groups_of_threads(world_size)))
    return ranks[0][0], [columns for _, columns in ranks]


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("quantize", ["", "int8", "int8-weight-only", "int4"])
def test_two_shards_of_nine_heads(biased_llama: Path, quantize: str, recorded: bool) -> None:
    by_itself, uneven = answers(biased_llama, 2, quantize, False, recorded)
    assert uneven == [80, 40]  # 6 query, 2 key and 2 value heads of 8, and half of that
    helped, even = answers(biased_llama, 2, quantize, True, recorded)
    assert even == [48, 72]  # attention's output has 48 and 24 more
    assert helped == by_itself


def test_one_that_helps_two(tmp_path: Path) -> None:
    """Five full heads on three shards: 2, 2 and 1."""
    path = make_checkpoint(
        tmp_path, hidden_size=160, num_attention_heads=5, num_key_value_heads=5, head_dim=32
    )
    by_itself, uneven = answers(path, 3, "", False, True)
    assert uneven == [192, 192, 96]
    helped, even = answers(path, 3, "", True, True)
    assert even == [160, 160, 160]
    assert helped == by_itself
