"""Reads a .gguf file: its metadata, its tensors, and the config.json that they amount to.

It writes nothing and leaves the tokenizer to gguf_tokenizer.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from headgate.launcher.errors import LaunchError

if TYPE_CHECKING:
    from gguf import GGUFReader

# architecture in the file -> (class, model_type, are the rotary halves of q and k interleaved)
ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama", True),
    "qwen2": ("Qwen2ForCausalLM", "qwen2", False),
    "qwen3": ("Qwen3ForCausalLM", "qwen3", False),
}
ROPE_FACTORS = "rope_freqs.weight"  # becomes part of config.json, not of the weights


class GgufError(LaunchError):
    """A GGUF file that cannot be used; the text is one sentence for the user."""


class GgufFile:
    """An open file: its metadata as plain Python values, and its tensors by name."""

    def __init__(self, name: str, reader: GGUFReader) -> None:
        self.name = name
        self.metadata = Metadata(reader)
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}


class Metadata(dict[str, Any]):
    """The file's key-value pairs, each decoded when asked for (a vocabulary takes a second)."""

    def __init__(self, reader: GGUFReader) -> None:
        super().__init__(reader.fields)

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(key).contents()

    def get(self, key: str, default: Any = None) -> Any:
        try:
            return self[key]
        except KeyError:
            return default


def open_gguf(source: Path) -> GgufFile:
    from gguf import GGUFReader

    try:
        model = GgufFile(source.name, GGUFReader(source))
    except Exception as error:  # the reader has no error type of its own: numpy's, struct's, enum's
        raise GgufError(f"{source}: not a complete GGUF file ({error})") from error
    if int(model.metadata.get("split.count", 1)) > 1:
        raise GgufError(
            f"{source}: one part of a split model; join the parts with llama.cpp's gguf-split first"
        )
    return model


def model_config(model: GgufFile) -> dict[str, Any]:
    """The config.json that the model's authors would have published."""
    data = model.metadata
    arch = data.get("general.architecture")
    if arch not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise GgufError(
            f"{model.name}: architecture {arch!r} is not supported (of GGUF files: {known})"
        )
    if int(data.get(f"{arch}.expert_count", 0)):
        raise GgufError(f"{model.name}: mixture-of-experts models are not supported as GGUF files")

    def number(key: str, kind: type[int] | type[float], default: Any = None) -> Any:
        value = data.get(f"{arch}.{key}", default)
        if value is None or isinstance(value, list):
            raise GgufError(
                f"{model.name}: metadata {arch}.{key} is {'missing' if value is None else 'a list'}"
            )
        return kind(value)

    class_name, model_type, _ = ARCHITECTURES[arch]
    if "token_embd.weight" not in model.tensors:
        raise GgufError(f"{model.name}: tensor 'token_embd.weight' is missing")
    heads = number("attention.head_count", int)
    hidden = number("embedding_length", int)
    head_dim = number("attention.key_length", int, hidden // heads)
    if number("rope.dimension_count", int, head_dim) != head_dim:
        raise GgufError(
            f"{model.name}: rotary embeddings over a part of the head are not supported"
        )
    if number("attention.value_length", int, head_dim) != head_dim:
        raise GgufError(f"{model.name}: values of another length than keys are not supported")
    config: dict[str, Any] = {
        "architectures": [class_name],
        "model_type": model_type,
        "vocab_size": int(model.tensors["token_embd.weight"].shape[-1]),
        "hidden_size": hidden,
        "intermediate_size": number("feed_forward_length", int),
        "num_hidden_layers": number("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": float(f"{number('attention.layer_norm_rms_epsilon', float):.6g}"),
        "rope_theta": number("rope.freq_base", float, 10000.0),
        "max_position_embeddings": number("context_length", int),
        "tie_word_embeddings": "output.weight" not in model.tensors,
        "torch_dtype": "bfloat16",
        "attention_bias": "blk.0.attn_q.bias" in model.tensors,
        **_special_tokens(model),
    }
    if window := int(data.get(f"{arch}.attention.sliding_window", 0)):
        config["sliding_window"] = window
        if arch == "llama":
            config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
        else:
            config |= {"use_sliding_window": True, "max_window_layers": 0}
    if scaling := _rope_scaling(model, arch, config):
        config["rope_scaling"] = scaling
    return config


def _special_tokens(model: GgufFile) -> dict[str, Any]:
    ids = {
        name: int(model.metadata[key])
        for name, key in (
            ("bos_token_id", "tokenizer.ggml.bos_token_id"),
            ("pad_token_id", "tokenizer.ggml.padding_token_id"),
        )
        if key in model.metadata
    }
    ends: list[int] = []
    for kind in ("eos", "eot", "eom"):  # end of sequence, of a turn, of a message
        value = model.metadata.get(f"tokenizer.ggml.{kind}_token_id")
        if value is not None and int(value) not in ends:
            ends.append(int(value))
    if not ends:
        raise GgufError(f"{model.name}: metadata tokenizer.ggml.eos_token_id is missing")
    return {**ids, "eos_token_id": ends if len(ends) > 1 else ends[0]}


def _rope_scaling(model: GgufFile, arch: str, config: dict[str, Any]) -> dict[str, Any] | None:
    data = model.metadata
    original = int(data.get(f"{arch}.rope.scaling.original_context_length", 0))
    if ROPE_FACTORS in model.tensors:
        # Llama 3's scaling travels as a divisor per frequency, which "longrope" states exactly.
        factors = [float(x) for x in model.tensors[ROPE_FACTORS].data]
        return {
            "rope_type": "longrope",
            "short_factor": factors,
            "long_factor": factors,
            "attention_factor": 1.0,
            "original_max_position_embeddings": original or config["max_position_embeddings"],
        }
    kind = data.get(f"{arch}.rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise GgufError(f"{model.name}: rope scaling {kind!r} is not supported in GGUF files")
    scaling: dict[str, Any] = {
        "rope_type": kind,
        "factor": float(data.get(f"{arch}.rope.scaling.factor", 1.0)),
    }
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = original or config["max_position_embeddings"]
    return scaling
