"""ModelConfig: what config.json and generation_config.json say, under one set of names.

Fields hold what all decoder-only models share. What only one family has, its model file reads from
`extra`. Needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headgate.shard.errors import ModelError
from headgate.shard.rope_config import RopeConfig, read_rope_config


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only model's sizes and constants."""

    architecture: str  # first of "architectures", e.g. LlamaForCausalLM
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    hidden_act: str
    tie_word_embeddings: bool
    rope: RopeConfig
    eos_token_ids: tuple[int, ...] = ()  # generation_config.json before config.json
    bos_token_id: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)  # config.json as it is

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads


def read_model_config(
    path: str | Path, rope_scaling: str = "", rope_factor: float = 0.0
) -> ModelConfig:
    """Reads the checkpoint directory `path`. Raises ModelError when config.json is unfit."""
    return parse_model_config(*read_config_files(path), rope_scaling, rope_factor)


def read_config_files(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Contents of config.json and generation_config.json ({} where there is none) in `path`."""
    directory = Path(path)
    config = _read_json(directory / "config.json")
    if config is None:
        raise ModelError(f"{directory} has no config.json, so it is not a model checkpoint")
    return config, _read_json(directory / "generation_config.json") or {}


def parse_model_config(
    config: Mapping[str, Any],
    generation: Mapping[str, Any],
    rope_scaling: str = "",
    rope_factor: float = 0.0,
) -> ModelConfig:
    """The two files' contents as a ModelConfig. Raises ModelError naming what is unfit."""
    hidden = _size(config, "hidden_size")
    heads = _size(config, "num_attention_heads")
    kv_heads = _size(config, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise ModelError(
            f"config.json: {heads} attention heads don't divide into {kv_heads} key/value heads"
        )
    eos = generation.get("eos_token_id")
    return ModelConfig(
        architecture=architecture_of(config),
        model_type=str(config.get("model_type") or ""),
        vocab_size=_size(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_size(config, "intermediate_size"),
        num_layers=_size(config, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=_size(config, "head_dim", hidden // heads),
        max_position_embeddings=_size(config, "max_position_embeddings", 2048),
        rms_norm_eps=float(config.get("rms_norm_eps") or 1e-6),
        hidden_act=str(config.get("hidden_act") or config.get("hidden_activation") or "silu"),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        rope=read_rope_config(config, rope_scaling, rope_factor),
        eos_token_ids=_ids(config.get("eos_token_id") if eos is None else eos),
        bos_token_id=next(iter(_ids(config.get("bos_token_id"))), None),
        extra=config,
    )


def architecture_of(config: Mapping[str, Any]) -> str:
    """The architecture's name, or "" where config.json gives none."""
    return str(next(iter(config.get("architectures") or ()), ""))


def _read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`, or None where there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} is not a JSON object")
    return value


def _size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise ModelError(f"config.json lacks {key!r}")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(f"config.json: {key} must be a positive integer, not {value!r}")
    return value


def _ids(value: Any) -> tuple[int, ...]:
    """A token id, a list of them or null."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (int(value),)
