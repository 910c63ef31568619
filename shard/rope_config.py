"""How a checkpoint turns positions into angles: RopeConfig, read from config.json.

The angles themselves are computed in layers/rotary.py. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from headgate.shard.errors import ModelError

DEFAULT_THETA = 10000.0

# Names found in configs, and the kind each one means. Multimodal RoPE turns text by the default.
_KINDS = {
    "default": "default",
    "mrope": "default",
    "linear": "linear",
    "dynamic": "dynamic",
    "llama3": "llama3",
    "yarn": "yarn",
    "su": "longrope",
    "longrope": "longrope",
}
_NEEDED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Fields that a kind does not use keep their defaults."""

    kind: str = "default"  # default, linear, dynamic, llama3, yarn, longrope
    theta: float = DEFAULT_THETA
    factor: float = 1.0
    partial_rotary_factor: float = 1.0  # part of each head that is rotated
    max_position_embeddings: int = 2048  # as the checkpoint says
    original_max_position_embeddings: int = 2048  # before the context was extended
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    attention_factor: float | None = None  # yarn, longrope: scale of cos and sin; None: derived
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    mscale: float = 0.0  # yarn
    mscale_all_dim: float = 0.0  # yarn
    truncate: bool = True  # yarn
    short_factor: tuple[float, ...] = ()  # longrope
    long_factor: tuple[float, ...] = ()  # longrope


def read_rope_config(
    config: Mapping[str, Any], override: str = "", override_factor: float = 0.0
) -> RopeConfig:
    """Reads `rope_parameters` (Transformers 5) or `rope_scaling` beside `rope_theta` (older).

    `override` and `override_factor` replace the checkpoint's scaling, as TGI's --rope-scaling and
    --rope-factor do: a kind alone has factor 1, a factor alone means linear. Raises ModelError for
    a kind that is unknown or lacks a number it needs.
    """
    given = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if any(isinstance(value, Mapping) for value in given.values()):
        raise ModelError("config.json gives each layer type its own RoPE, which is not supported")
    theta = given.get("rope_theta") or config.get("rope_theta") or DEFAULT_THETA
    partial = given.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if override or override_factor:
        given = {"rope_type": override or "linear", "factor": override_factor or 1.0}
    name = str(given.get("rope_type") or given.get("type") or "default")
    kind = _KINDS.get(name)
    if kind is None:
        raise ModelError(f"RoPE of type {name!r} is not supported; known: {', '.join(_KINDS)}")
    missing = [key for key in _NEEDED.get(kind, ()) if given.get(key) is None]
    if missing:
        raise ModelError(f"RoPE of type {name!r} needs {', '.join(missing)} in config.json")
    length = int(config.get("max_position_embeddings") or 2048)
    original = (
        config.get("original_max_position_embeddings")
        or given.get("original_max_position_embeddings")
        or length
    )
    optional = {
        key: given[key]
        for key in (
            *("low_freq_factor", "high_freq_factor", "attention_factor", "truncate"),
            *("beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
        )
        if given.get(key) is not None
    }
    return RopeConfig(
        kind=kind,
        theta=float(theta),
        factor=float(given.get("factor") or length / original),
        partial_rotary_factor=float(partial),
        max_position_embeddings=length,
        original_max_position_embeddings=int(original),
        short_factor=tuple(given.get("short_factor") or ()),
        long_factor=tuple(given.get("long_factor") or ()),
        **optional,
    )
