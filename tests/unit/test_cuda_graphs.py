"""Decode steps as CUDA graphs on a device that is not there: what is replayed, at what cost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from headgate.kernels import ops, reference
from headgate.shard import cuda_graphs
from headgate.shard.cuda_graphs import GraphedModel, GraphLimits, reach_of, usual_sizes
from headgate.shard.distributed import single_group
from headgate.shard.kv_cache import KVCacheLayout
from headgate.shard.models.registry import load_model
from headgate.shard.trial_steps import TrialSteps
from tests.unit.fake_device import FakeDevice, Watch

# Triton's kernels know that padding writes nowhere.
pytestmark = pytest.mark.usefixtures("triton_kernels")


@pytest.fixture
def made(tiny_llama: Path) -> tuple[Any, FakeDevice, GraphedModel, KVCacheLayout]:
    model = load_model(tiny_llama, dtype="float32", device="cpu", group=single_group())
    layout = KVCacheLayout(
        model.num_layers, 16, model.num_local_kv_heads, model.head_dim, torch.float32
    )
    device = FakeDevice()
    return model, device, GraphedModel(model, device, usual_sizes(6), GraphLimits(64, 32)), layout


def test_steps_give_what_the_model_gives(made: Any) -> None:
    model, device, graphed, layout = made
    trial = TrialSteps(layout, model.config.vocab_size)
    ours, theirs = trial.new_cache(), trial.new_cache()
    graphed.bind(ours)
    steps = [
        {0: 5, 1: 3},
        {0: 1, 1: 1},
        {0: 1, 1: 1, 2: 1},
        {0: 1, 1: 1, 2: 1},
        {1: 4, 2: 1},
        {2: 1},
    ]
    for counts in steps:
        step = trial.step(counts)
        graphed.staging.begin()
        with torch.inference_mode():
            states = model.forward(step.input_ids, step.positions, theirs, step.attention)
            tokens = step.wanted_tokens
            for wanted in (tokens, tokens.flip(0)[:2], tokens[:0]):
                got = graphed.forward(replace(step, wanted_tokens=wanted))
                torch.testing.assert_close(got, states[wanted], rtol=1e-4, atol=1e-4)
    assert device.calls.count("capture") == 3  # 2 rows, 3 padded to 4, 1
    assert device.calls.count("replay") == 9  # each twice more, and one of a size known already
    # Padding wrote nowhere.
    torch.testing.assert_close(ours.data, theirs.data, rtol=1e-4, atol=1e-4)


def test_steps_with_prompts_come_in_few_sizes(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, graphed, layout = made
    sizes = []
    forward = model.forward

    def noted(ids: torch.Tensor, *more: Any) -> torch.Tensor:
        sizes.append(len(ids))
        return forward(ids, *more)

    monkeypatch.setattr(model, "forward", noted)
    trial = TrialSteps(layout, model.config.vocab_size)
    graphed.bind(trial.new_cache())
    for counts in ({0: 2, 1: 3}, {0: 1, 1: 1, 2: 17}):
        step = trial.step(counts)
        graphed.staging.begin()
        with torch.inference_mode():
            assert len(graphed.forward(step)) == len(step.input_ids)
    assert sizes == [16, 32]
    assert [cuda_graphs.padded_tokens(n) for n in (16, 33, 64, 65, 129)] == [16, 64, 64, 128, 192]


def test_a_replayed_step_allocates_nothing_and_waits_for_nothing(made: Any) -> None:
    model, device, graphed, layout = made
    trial = TrialSteps(layout, model.config.vocab_size)
    graphed.bind(trial.new_cache())
    with torch.inference_mode():
        graphed.forward(trial.step({0: 1, 1: 1, 2: 1}))
        step = trial.step({0: 1, 1: 1, 2: 1})
        device.calls.clear()
        with Watch() as watch:
            graphed.forward(step)
    assert device.calls == ["upload", "upload", "replay"]
    views = {"aten::slice.Tensor", "aten::unbind.int", "aten::select.int", "aten::detach"}
    views |= {"aten::to.dtype_layout", "aten::resolve_conj", "aten::resolve_neg"}  # of .numpy()
    assert watch.names <= views | {"aten::copy_", "aten::fill_.Scalar", "aten::zero_"}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8], ids=str)
def test_a_model_with_a_narrow_cache_gives_what_the_reference_gives(
    made: Any, dtype: torch.dtype
) -> None:
    """But for float8's write: the interpreter rounds to float8 wrongly now and then."""
    model, _, _, layout = made
    narrow = replace(layout, dtype=dtype)
    kinds = (("triton", narrow), ("reference", narrow), ("reference", layout))
    caches = [TrialSteps(kept, 8).new_cache() for _, kept in kinds]
    trial = TrialSteps(narrow, model.config.vocab_size)
    for counts in ({0: 9, 1: 3}, {0: 1, 1: 1}, {1: 1, 0: 2}):
        step = trial.step(counts)
        states = []
        for (backend, _), cache in zip(kinds, caches, strict=True):
            ops.use(backend)
            if dtype != torch.int8:
                ops._table["rotary_and_write_kv"] = reference.rotary_and_write_kv
            with torch.inference_mode():
                states.append(model.forward(step.input_ids, step.positions, cache, step.attention))
        ours, theirs, exact = states
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert (theirs - exact).abs().mean() > 1e-3


def test_graphs_unused_for_longest_are_dropped(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, device, graphed, layout = made
    monkeypatch.setattr(cuda_graphs, "MOST_GRAPHS", 2)
    trial = TrialSteps(layout, model.config.vocab_size)
    graphed.bind(trial.new_cache())
    with torch.inference_mode():
        for rows in (1, 2, 1, 3, 1):  # the third size takes the place of the second
            graphed.forward(trial.step(dict.fromkeys(range(rows), 1)))
            graphed.staging.begin()
        assert (device.calls.count("capture"), device.calls.count("replay")) == (3, 2)
        graphed.forward(trial.step({0: 1, 1: 1}))
    assert device.calls.count("capture") == 4


def test_another_cache_drops_the_graphs(made: Any) -> None:
    model, device, graphed, layout = made
    trial = TrialSteps(layout, model.config.vocab_size)
    with torch.inference_mode():
        graphed.bind(trial.new_cache())
        graphed.forward(trial.step({0: 1}))
        graphed.release()
        graphed.bind(trial.new_cache())
        graphed.forward(trial.step({0: 1}))
    assert device.calls.count("capture") == 2


def test_sizes() -> None:
    assert usual_sizes(1) == [1]
    assert usual_sizes(6) == [1, 2, 4, 6]
    assert usual_sizes(30) == [1, 2, 4, 8, 16, 24, 30]
    assert [reach_of(context, 5000) for context in (1, 512, 513, 4097)] == [512, 512, 1024, 5000]
