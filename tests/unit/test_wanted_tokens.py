"""Hidden states of some of a step's tokens: the same ones, and nothing computed for the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from headgate.proto.messages import NewRow, Pooling, RowSampling, StepPlan
from headgate.shard.config import ShardIdentity
from headgate.shard.distributed import single_group
from headgate.shard.kv_cache import KVCacheLayout
from headgate.shard.model_runner import ModelRunner
from headgate.shard.models.base import CausalLM
from headgate.shard.models.registry import load_model
from headgate.shard.trial_steps import TrialSteps
from tests.unit.fake_model import shard_config

PROMPT = list(b"a quick brown fox")


def load(path: Path) -> CausalLM:
    return load_model(path, dtype="float32", device="cpu", group=single_group())


def mlp_rows(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """For each layer, how many tokens its MLP is given in each step."""
    seen: list[list[int]] = []
    for layer in model.layers:
        rows: list[int] = []

        def noted(x: Any, residual: Any, mlp: Any = layer.mlp, rows: list[int] = rows) -> Any:
            rows.append(len(residual))
            return mlp(x, residual)

        monkeypatch.setattr(layer, "mlp", noted)
        seen.append(rows)
    return seen


@pytest.mark.parametrize("kernels", ["reference_kernels", "cpu_kernels"])
def test_the_same_states(tiny_llama: Path, kernels: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(kernels)
    model = load(tiny_llama)
    layout = KVCacheLayout(
        model.num_layers, 16, model.num_local_kv_heads, model.head_dim, torch.float32
    )
    trial = TrialSteps(layout, model.config.vocab_size)
    inputs, caches = trial.step({0: 5, 1: 1, 2: 3}), (trial.new_cache(), trial.new_cache())
    with torch.inference_mode():
        step = inputs.input_ids, inputs.positions
        states = model.forward(*step, caches[0], inputs.attention)
        for wanted in ([4, 5, 8], [8, 0], []):
            indices = torch.tensor(wanted, dtype=torch.int64)
            some = model.forward(*step, caches[1], inputs.attention, indices)
            torch.testing.assert_close(some, states[indices])
    assert torch.equal(caches[0].data, caches[1].data), "keys and values of all"


def test_the_last_layer_goes_on_with_those_alone(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tiny_llama)
    runner = ModelRunner(model, single_group(), shard_config(), ShardIdentity(0, 1, epoch=1))
    runner.allocate(40)
    first, last = mlp_rows(model, monkeypatch)
    wishes = (
        RowSampling(4),
        RowSampling(4, prompt_logprobs=True),
        RowSampling(1, pooling=Pooling.MEAN),
        RowSampling(1, pooling=Pooling.LAST),
    )
    rows = [
        NewRow(i, PROMPT, wish, block_ids=range(8 * i, 8 * i + 8)) for i, wish in enumerate(wishes)
    ]
    runner.step(StepPlan(1, 1, rows=[0], counts=[10], new_rows=rows))
    runner.step(StepPlan(1, 2, rows=[0, 1, 2, 3], counts=[7, 10, 10, 10]))
    runner.step(StepPlan(1, 3, rows=[0, 1, 2, 3], counts=[1, 7, 7, 7]))
    assert first == [10, 37, 22]
    assert last == [
        0,
        1 + 10 + 10,  # a token, logprobs of a prompt's tokens, their mean
        1 + 7 + 7 + 1,
    ]
