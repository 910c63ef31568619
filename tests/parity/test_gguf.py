"""Converted .gguf weights against Transformers' own reading of the same files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from safetensors import safe_open

from headgate.launcher.embedded_model import ensure_embedded_model, find_embedded_gguf
from headgate.launcher.gguf import convert_gguf
from tests.unit.tiny_gguf import write_gguf


@pytest.mark.parametrize("arch", ["llama", "qwen2"])  # of qwen3 it overlooks the head's size
def test_weights_are_those_that_transformers_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arch: str
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("HEADGATE_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "m.gguf", arch=arch, tied=False, kind=GGMLQuantizationType.Q8_0)
    ours = AutoModelForCausalLM.from_pretrained(convert_gguf(tmp_path / "m.gguf"), dtype="bfloat16")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype="float32")
    weights = theirs.state_dict()
    assert ours.state_dict().keys() == weights.keys()
    for name, value in ours.state_dict().items():
        assert torch.equal(value, weights[name].to(torch.bfloat16)), name
    theirs.load_state_dict(ours.float().state_dict())  # the same rounding: configs alone may differ
    with torch.no_grad():
        ids = torch.arange(40).unsqueeze(0)
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_embedded_weights_are_the_dequantised_values() -> None:
    tensors = {tensor.name: tensor for tensor in GGUFReader(find_embedded_gguf()[0]).tensors}
    with safe_open(ensure_embedded_model() / "model.safetensors", "pt") as weights:
        assert len(weights.keys()) == len(tensors) == 272
        for layer in (0, 17, 29):
            for ours, theirs, heads in (
                ("self_attn.q_proj", "attn_q", 9),
                ("self_attn.k_proj", "attn_k", 3),
                ("mlp.down_proj", "ffn_down", 0),
                ("input_layernorm", "attn_norm", 0),
            ):
                tensor = tensors[f"blk.{layer}.{theirs}.weight"]
                value = dequantize(tensor.data, tensor.tensor_type)
                if heads:  # rows 0, 2, 4... of a head are its first rotary half
                    by_head = value.reshape(heads, 64, -1)
                    halves = [by_head[:, 0::2], by_head[:, 1::2]]
                    value = np.concatenate(halves, axis=1).reshape(value.shape)
                wanted = torch.from_numpy(np.array(value)).to(torch.bfloat16)
                name = f"model.layers.{layer}.{ours}.weight"
                assert torch.equal(weights.get_tensor(name), wanted), name
