"""How a GPU's memory is divided before serving, and what is said where it is too small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from headgate.shard import warmup
from headgate.shard.config import ShardIdentity
from headgate.shard.distributed import single_group
from headgate.shard.errors import ModelError
from headgate.shard.model_runner import ModelRunner
from headgate.shard.models.registry import load_model
from tests.unit.fake_device import FakeDevice
from tests.unit.fake_model import FakeModel, shard_config

pytestmark = pytest.mark.usefixtures("triton_kernels")


def runner_on(device: FakeDevice, model: Any = None, **config: Any) -> ModelRunner:
    """As many blocks as fit, of 128 tokens a request and 64 a step."""
    fields = {"cuda_graphs": "0", "device": "cuda", "num_blocks": 0, **config}
    runner = ModelRunner(
        model or FakeModel(),  # type: ignore[arg-type]
        single_group(),
        shard_config(**fields),
        ShardIdentity(0, 1, 1),
        device,
    )
    object.__setattr__(runner.config, "device", "cpu")  # where its tensors are all the same
    return runner


def test_blocks_beside_the_largest_step(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice()
    runner = runner_on(device)
    block = runner.kv_layout.bytes_per_block
    device.total, device.free, device.reserved = 1000 * block, 600 * block, 300 * block
    device.peak = 250 * block
    step = warmup._LargestStep(64, kv_bytes=10 * block, graph_bytes=40 * block)
    # 950 usable, 100 taken by others, 240 by weights and the step, 40 by graphs.
    assert warmup._blocks_that_fit(runner, device.memory(), step) == 570
    # 32 are one request's; with 30 left it takes fewer tokens, a smaller step, or no graphs.
    device.free, device.reserved = 60 * block, 300 * block
    with pytest.raises(ModelError, match=r"of 128 tokens.* what fits: ") as error:
        warmup._blocks_that_fit(runner, device.memory(), step)
    found = str(error.value)
    assert "--max-batch-prefill-tokens 63" in found
    assert "--max-total-tokens 120" in found and "--cuda-graphs 0" in found
    device.free = 0
    runner.model.weight_bytes = 240 * block
    with pytest.raises(ModelError, match="use more GPUs"):
        warmup._blocks_that_fit(runner, device.memory(), step)


def test_a_step_beyond_memory_names_the_largest_that_fits() -> None:
    class SmallModel(FakeModel):
        def forward(self, input_ids: torch.Tensor, *rest: Any) -> torch.Tensor:
            if len(input_ids) > 20:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(input_ids, *rest)

    runner = runner_on(FakeDevice(), SmallModel())
    with pytest.raises(ModelError, match=r"a step of 64 tokens.* --max-batch-prefill-tokens 16"):
        warmup.warm_up(runner, 64, 0)


def test_graphs_that_serving_may_capture_are_counted(tiny_llama: Path) -> None:
    model = load_model(tiny_llama, dtype="float32", device="cpu", group=single_group())
    device = FakeDevice()
    device.graph_bytes = 5 << 20
    runner = runner_on(device, model, cuda_graphs="1,2", max_total_tokens=64)
    blocks = warmup.warm_up(runner, 16, 0)
    graphs = runner.recorded.num_possible  # type: ignore[union-attr]
    assert device.calls.count("capture") == 2
    taken = graphs * device.graph_bytes
    usable = int(device.total * 0.95) - (device.total - device.free) - taken
    found = blocks * runner.kv_layout.bytes_per_block
    assert found == pytest.approx(usable, abs=device.graph_bytes / 2)  # and the warm-up's cache
