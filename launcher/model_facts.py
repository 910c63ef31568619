"""What sizes depend on: the numbers in a model's config.json, under one set of names.

It refuses early what is plainly not a decoder-only language model. Whether an architecture can be
served is the shard's to say (its registry of models); the launcher never imports that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headgate.launcher.errors import LaunchError
from headgate.launcher.safetensors_header import WeightFiles, read_weight_files

# fmt: off
_ENCODER_DECODER = (  # model types
    "t5", "mt5", "umt5", "longt5", "bart", "mbart", "pegasus", "marian", "m2m_100",
    "blenderbot", "led", "prophetnet", "whisper",
)
_VISION = (  # model types
    "llava", "llava_next", "llava_onevision", "idefics", "idefics2", "idefics3", "paligemma",
    "mllama", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "pix2struct", "blip", "blip-2", "fuyu",
    "chameleon", "florence2", "smolvlm", "internvl",
)
_STATE_SPACE = (  # model types
    "mamba", "mamba2", "falcon_mamba", "jamba", "zamba", "zamba2", "bamba", "rwkv",
    "recurrent_gemma",
)
# fmt: on
_ENCODER_ONLY = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification")


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A checkpoint as autosize sees it."""

    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int  # 0: config.json does not say
    dtype: str  # of the checkpoint: "bfloat16", "float16", "float32", "" if it does not say
    parameters: int  # all weights, embeddings included
    tied_embeddings: bool = False  # the vocabulary's projection has no weights of its own

    def kv_heads_on(self, rank: int, num_shard: int) -> int:
        """Key/value heads that a rank holds; with more ranks than heads each has a copy of one."""
        if num_shard >= self.num_kv_heads:
            return 1
        share, larger = divmod(self.num_kv_heads, num_shard)
        return share + (rank < larger)

    @property
    def computed_per_token(self) -> int:
        """Weights multiplied with for each token of a step: all but embedding and vocabulary."""
        return max(self.parameters - self.embedding_parameters, self.parameters // 4)

    @property
    def embedding_parameters(self) -> int:
        """Weights of the table that token ids are looked up in."""
        return self.vocab_size * self.hidden_size

    @property
    def layer_parameters(self) -> int:
        """Weights of the layers: neither that table's nor those of the vocabulary's projection."""
        others = self.embedding_parameters * (1 if self.tied_embeddings else 2)
        return max(0, self.parameters - others)


def read_model_facts(directory: Path, *, weights: str = "", own_module: bool = False) -> ModelFacts:
    """Reads config.json and the weight files' headers.

    `weights`: the directory that holds them, where it is another one. `own_module`: the user brings
    the architecture, so its kind is not judged by name. Raises LaunchError with one sentence.
    """
    config = read_config(directory)
    if not own_module:
        refuse_other_kinds(config, directory)
    return make_facts(config, read_weight_files(Path(weights or directory)), directory)


def read_config(directory: Path) -> dict[str, Any]:
    """config.json as it is. Raises LaunchError when it is missing or not an object."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise LaunchError(
            f"{directory} has no config.json, so it is not a model checkpoint."
        ) from None
    except OSError as error:
        raise LaunchError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise LaunchError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(config, dict):
        raise LaunchError(f"{path} does not hold a JSON object.")
    return config


def refuse_other_kinds(config: Mapping[str, Any], directory: Path) -> None:
    """Raises LaunchError for models that are obviously not decoder-only and text-only."""
    architecture = _architecture(config)
    model_type = str(config.get("model_type") or "")
    kind = ""
    if model_type in _VISION or "vision_config" in config:
        kind = "a vision model"
    elif model_type in _ENCODER_DECODER or config.get("is_encoder_decoder"):
        kind = "an encoder-decoder model"
    elif model_type in _STATE_SPACE:
        kind = "a state-space model"
    elif architecture.endswith(_ENCODER_ONLY):
        kind = "an encoder that does not generate text"
    if kind:
        raise LaunchError(
            f"{architecture or model_type} in {directory} is {kind}; Headgate serves decoder-only "
            "text models."
        )
    quantisation = config.get("quantization_config")
    if quantisation:
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
        raise LaunchError(
            f"{directory} holds weights quantised with {method or 'an unnamed method'}; no "
            "quantisation is available in this version."
        )


def make_facts(config: Mapping[str, Any], weights: WeightFiles, directory: Path) -> ModelFacts:
    """The numbers under one set of names. Raises LaunchError naming one that is missing."""
    architecture = _architecture(config)

    def number(*names: str, default: int | None = None) -> int:
        for name in names:
            value = config.get(name)
            if isinstance(value, int) and value > 0:
                return value
        if default is None:
            raise LaunchError(
                f"config.json in {directory} ({architecture or 'no architecture named'}) has no "
                f"usable {names[0]}."
            )
        return default

    hidden = number("hidden_size", "n_embd", "d_model")
    heads = number("num_attention_heads", "n_head", "n_heads")
    types = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
    named = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    return ModelFacts(
        architecture=architecture,
        num_layers=number("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=number("num_key_value_heads", "num_kv_heads", default=heads),
        head_dim=number("head_dim", default=hidden // heads),
        intermediate_size=number(
            "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", default=4 * hidden
        ),
        vocab_size=number("vocab_size"),
        max_position_embeddings=number(
            "max_position_embeddings", "max_seq_len", "n_positions", "seq_length", default=0
        ),
        dtype=types.get(weights.dtype, named if named in types.values() else ""),
        parameters=weights.parameters,
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
    )


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""
