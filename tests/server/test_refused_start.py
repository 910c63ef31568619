"""Starts that cannot succeed: one sentence saying what is wrong, exit code not 0, nothing left."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.server.live_server import LiveServer


@pytest.fixture
def broken(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint to be damaged."""
    copy = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, copy)
    return copy


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_config(path: Path, **changes: object) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refused(*flags: str, port: int | None = None) -> str:
    """The launcher's log; asserts that it ended in failure and left nothing."""
    live = LiveServer(*flags, port=port)
    family = live.family()
    assert live.wait_exit(60) != 0
    assert not [p for p in family if p.is_running() and p.pid != live.process.pid]
    assert "Traceback" not in live.log, live.log
    return live.log


def test_missing_tensor(broken: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    edit_weights(broken, lambda tensors: tensors.pop(name))
    assert name in refused("--model-id", str(broken))


def test_wrong_shape_on_two_shards(broken: Path) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"

    def halve(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name][: len(tensors[name]) // 2].clone()

    edit_weights(broken, halve)
    assert name in refused("--model-id", str(broken), "--num-shard", "2")


def test_truncated_file(broken: Path) -> None:
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert "model.safetensors" in refused("--model-id", str(broken))


def test_unknown_architecture(broken: Path) -> None:
    edit_config(broken, architectures=["MadeUpForCausalLM"], model_type="made_up")
    assert "MadeUpForCausalLM" in refused("--model-id", str(broken))


@pytest.mark.parametrize(
    ("architecture", "model_type", "word"),
    [
        ("T5ForConditionalGeneration", "t5", "encoder-decoder"),
        ("LlavaForConditionalGeneration", "llava", "vision"),
        ("MambaForCausalLM", "mamba", "state-space"),
    ],
)
def test_other_kinds_of_model_are_named(
    broken: Path, architecture: str, model_type: str, word: str
) -> None:
    edit_config(broken, architectures=[architecture], model_type=model_type)
    log = refused("--model-id", str(broken))
    assert architecture in log and word in log


def test_missing_directory(tmp_path: Path) -> None:
    assert "nowhere" in refused("--model-id", str(tmp_path / "nowhere"))


def test_more_shards_than_heads(tiny_checkpoint: Path) -> None:
    heads = json.loads((tiny_checkpoint / "config.json").read_text())["num_attention_heads"]
    log = refused("--model-id", str(tiny_checkpoint), "--num-shard", str(heads + 1))
    assert str(heads) in log and str(heads + 1) in log


def test_too_little_memory(broken: Path) -> None:
    log = refused("--model-id", str(broken), "--max-batch-total-tokens", str(10**12))
    assert "max-batch-total-tokens" in log and "free" in log


def test_port_in_use(tiny_checkpoint: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert str(port) in refused("--model-id", str(tiny_checkpoint), port=port)
