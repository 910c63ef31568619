"""Loading by architecture name, and the sentence a user reads when a checkpoint can't be served."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from headgate.shard.attention_metadata import AttentionMetadata
from headgate.shard.distributed import single_group
from headgate.shard.errors import ModelError
from headgate.shard.kv_cache import KVCache, KVCacheLayout
from headgate.shard.model_config import read_model_config
from headgate.shard.models import registry
from headgate.shard.models.base import CausalLM

pytestmark = pytest.mark.usefixtures("reference_kernels")


def load(path: Path, **more: Any) -> CausalLM:
    return registry.load_model(
        path, **{"dtype": "float32", "device": "cpu", "group": single_group(), **more}
    )


@pytest.fixture
def copy(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def edit_config(path: Path, **changes: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_weights(path: Path, **changes: torch.Tensor | None) -> None:
    file = path / "model.safetensors"
    tensors = {**load_file(file), **changes}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, file)


def assert_one_sentence(error: pytest.ExceptionInfo[ModelError], *words: str) -> None:
    message = str(error.value)
    assert "\n" not in message and len(message) < 400
    for word in words:
        assert word in message


def test_facts_of_a_loaded_model(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    assert (model.num_layers, model.num_local_heads, model.num_local_kv_heads) == (2, 9, 3)
    assert (model.head_dim, model.max_positions, model.config.eos_token_ids) == (8, 512, (258,))
    stored = load_file(tiny_llama / "model.safetensors")
    assert model.weight_bytes == sum(tensor.numel() * 4 for tensor in stored.values())


def test_tied_weights_are_held_once(copy: Path) -> None:
    edit_config(copy, tie_word_embeddings=True)
    assert load(copy).weight_bytes == load(copy).weight_bytes  # lm_head.weight is left alone
    stored = load_file(copy / "model.safetensors")
    held = sum(tensor.numel() * 4 for name, tensor in stored.items() if name != "lm_head.weight")
    assert load(copy).weight_bytes == held


def test_logits_of_no_rows(tiny_llama: Path) -> None:
    logits = load(tiny_llama).logits(torch.empty(0, 72))
    assert logits is not None and logits.shape == (0, 259)


def test_sequences_beyond_the_position_table(tiny_llama: Path) -> None:
    model = load(tiny_llama, max_positions=16)
    one = torch.zeros(1, dtype=torch.int32)
    attention = AttentionMetadata(one, one, one.view(1, 1), one.long(), 1, 17)
    cache = KVCache(KVCacheLayout(2, 4, 3, 8, torch.float32), 5)
    with pytest.raises(ValueError, match="17 tokens, where the model was loaded for 16"):
        model.forward(one.long(), one.long(), cache, attention)


def test_generation_config_comes_first(copy: Path) -> None:
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert read_model_config(copy).eos_token_ids == (7, 9)
    (copy / "generation_config.json").unlink()
    assert read_model_config(copy).eos_token_ids == (258,)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5",
          "is_encoder_decoder": True}, ["T5For", "encoder-decoder"]),
        ({"architectures": ["BartForCausalLM"], "model_type": "bart"}, ["encoder-decoder"]),
        ({"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"},
         ["Llava", "vision-language"]),
        ({"architectures": ["Gemma3ForConditionalGeneration"], "vision_config": {}},
         ["vision-language"]),
        ({"architectures": ["MambaForCausalLM"], "model_type": "mamba"}, ["state-space"]),
        ({"architectures": ["BertForMaskedLM"], "model_type": "bert"},
         ["BertForMaskedLM", "not a causal language model"]),
        ({"architectures": ["GptOssForCausalLM"]}, ["GptOssForCausalLM is not supported (supp"]),
        ({}, ["without an architecture"]),
    ],
)  # fmt: skip
def test_unsupported_architectures(
    tmp_path: Path, config: dict[str, Any], words: list[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError) as error:
        load(tmp_path)
    assert_one_sentence(error, *words, "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 300}, ["model.embed_tokens.weight", "[259, 72]", "[300, 72]"]),
        ({"num_hidden_layers": 3}, ["lacks the tensor model.layers.2."]),
        ({"num_hidden_layers": 1}, ["no place for", "model.layers.1."]),
        ({"attention_bias": True}, ["lacks the tensor", "q_proj.bias"]),
        ({"num_key_value_heads": 4}, ["9 attention heads", "4 key/value heads"]),
        ({"hidden_act": "relu"}, ["hidden_act 'relu'"]),
        ({"hidden_size": "big"}, ["hidden_size must be a positive integer, not 'big'"]),
        ({"hidden_size": None}, ["lacks 'hidden_size'"]),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            ["by 'gptq' is not supported"],
        ),
    ],
)
def test_configs_that_do_not_fit(copy: Path, changes: dict[str, Any], words: list[str]) -> None:
    edit_config(copy, **changes)
    with pytest.raises(ModelError) as error:
        load(copy)
    assert_one_sentence(error, *words)


def test_missing_tensor(copy: Path) -> None:
    edit_weights(copy, **{"model.layers.1.mlp.up_proj.weight": None})
    with pytest.raises(ModelError, match=r"lacks the tensor model\.layers\.1\.mlp\.up_proj"):
        load(copy)


def test_truncated_file(copy: Path) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"model\.safetensors is truncated"):
        load(copy)


def test_missing_directory_and_bad_json(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"gone has no config\.json"):
        load(tmp_path / "gone")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json cannot be read as JSON"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "int3"}, "dtype 'int3'"),
        ({"quantize": "awq"}, "quantize 'awq' is not supported; there are int8"),
    ],
)
def test_settings_that_do_not_fit(tiny_llama: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load(tiny_llama, **settings)


def test_a_user_model(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_models", dict(registry._models))
    source = """
from headgate.shard.models.llama import LlamaForCausalLM
from headgate.shard.models.registry import register

@register("MineForCausalLM")
class Mine(LlamaForCausalLM):
    pass
"""
    file = tmp_path / "mine.py"
    file.write_text(source)
    edit_config(copy, architectures=["MineForCausalLM"])
    assert type(load(copy, model_module=str(file))).__name__ == "Mine"


@pytest.mark.parametrize(
    ("source", "message"),
    [(None, "FileNotFoundError"), ("import nothing_of_the_kind", "No module named")],
)
def test_a_user_model_that_fails(
    tiny_llama: Path, tmp_path: Path, source: str | None, message: str
) -> None:
    file = tmp_path / "bad.py"
    if source is not None:
        file.write_text(source)
    with pytest.raises(ModelError, match=rf"model module .*bad\.py: .*{message}"):
        load(tiny_llama, model_module=str(file))
