"""Decode steps as CUDA graphs on a device that is not there: what is replayed, at what cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from headgate.kernels import ops
from headgate.shard.cuda_graphs import GraphedModel, reach_of, usual_sizes
from headgate.shard.distributed import single_group
from headgate.shard.kv_cache import KVCacheLayout
from headgate.shard.models.registry import load_model
from headgate.shard.trial_steps import TrialSteps


@pytest.fixture(autouse=True)
def triton_kernels() -> Iterator[None]:
    """They know that padding writes nowhere."""
    pytest.importorskip("triton")
    before = ops.active()
    ops.use("triton")
    yield
    ops.use(before)


class FakeDevice:
    """Memory of the host; graphs compute when they are replayed, into the place of the capture."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def zeros(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        self.calls.append("zeros")
        return torch.zeros(shape, dtype=dtype)

    def pinned(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        self.calls.append("pinned")
        return torch.zeros(shape, dtype=dtype)

    def upload(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self.calls.append("upload")
        target.copy_(source)

    def capture(self, run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        self.calls.append("capture")
        result = run()

        def replay() -> None:
            self.calls.append("replay")
            with Unwatched():
                result.copy_(run())

        return replay, result


class Watch(TorchDispatchMode):
    """Notes PyTorch's operations, but for those of a replay, which are the device's."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not Unwatched.depth:
            self.names.add(func.name())
        return func(*args, **(kwargs or {}))


class Unwatched:
    depth = 0

    def __enter__(self) -> None:
        Unwatched.depth += 1

    def __exit__(self, *_: object) -> None:
        Unwatched.depth -= 1


@pytest.fixture
def made(tiny_llama: Path) -> tuple[Any, FakeDevice, GraphedModel, KVCacheLayout]:
    model = load_model(tiny_llama, dtype="float32", device="cpu", group=single_group())
    layout = KVCacheLayout(
        model.num_layers, 16, model.num_local_kv_heads, model.head_dim, torch.float32
    )
    device = FakeDevice()
    return model, device, GraphedModel(model, device, usual_sizes(6), 32), layout


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
        with torch.inference_mode():
            expected = model.forward(step.input_ids, step.positions, theirs, step.attention)
            got = graphed.forward(step)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(
                graphed.logits(step.sample_tokens),
                model.logits(expected[step.sample_tokens]),
                rtol=1e-4,
                atol=1e-4,
            )
    assert device.calls.count("capture") == 3  # 2 rows, 3 padded to 4, 1
    assert device.calls.count("replay") == 1
    # Padding wrote nowhere.
    torch.testing.assert_close(ours.data, theirs.data, rtol=1e-4, atol=1e-4)


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
    assert watch.names <= views | {"aten::copy_", "aten::fill_.Scalar", "aten::zero_"}


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
