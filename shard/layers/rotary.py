"""Rotary position embedding: the table of cosines and sines for every kind of RoPE.

The table is fixed when the model is loaded, so a token's angle depends on its position alone: never
on the length of its request, on other requests or on what ran before. For the two kinds whose
published definition depends on the current sequence length, the longest sequence that the server
admits (`length`) takes its place:

* dynamic NTK: the base is stretched as for a sequence of `length`. A server that admits no more
  than max_position_embeddings computes exactly the unscaled RoPE.
* longrope: the long factors where `length` exceeds original_max_position_embeddings, else the
  short ones.

Transformers stretches for the sequence at hand and keeps keys rotated by older, shorter stretches;
the two agree for a whole prompt of exactly `length`, and wherever nothing is stretched.
"""

from __future__ import annotations

import math

import torch

from headgate.kernels import ops
from headgate.kernels.int8_cache import PagedCache
from headgate.shard.errors import ModelError
from headgate.shard.rope_config import RopeConfig

HeadNorms = tuple[torch.Tensor, torch.Tensor, float]  # of queries, of keys; eps


class RotaryEmbedding:
    """Angles for positions below `length`, shared by all layers."""

    def __init__(self, rope: RopeConfig, head_dim: int, length: int, device: torch.device) -> None:
        self.length = length
        self._cos_sin = cos_sin_table(rope, head_dim, length).to(device)

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        positions: torch.Tensor,
        kv: tuple[PagedCache, PagedCache],
        slot_mapping: torch.Tensor,
        norms: HeadNorms | None = None,
    ) -> torch.Tensor:
        """Rotates q[T, H, D] and k[T, K, D] by positions[T] (< length), stores k and v[T, K, D] in
        the caches `kv` at slot_mapping[T], and returns q. May work in place."""
        return ops.rotary_and_write_kv(q, k, v, positions, self._cos_sin, *kv, slot_mapping, norms)


def cos_sin_table(rope: RopeConfig, head_dim: int, length: int) -> torch.Tensor:
    """float32[length, r]: r/2 cosines, then r/2 sines, where r dimensions of a head are rotated."""
    frequencies, scale = inverse_frequencies(rope, head_dim, length)
    angles = torch.arange(length, dtype=torch.float32).unsqueeze(1) * frequencies
    return torch.cat((angles.cos() * scale, angles.sin() * scale), dim=1)


def inverse_frequencies(rope: RopeConfig, head_dim: int, length: int) -> tuple[torch.Tensor, float]:
    """(radians per position, float32[r/2]; factor on cosines and sines)."""
    dim = int(head_dim * rope.partial_rotary_factor)
    if dim < 2 or dim % 2:
        raise ModelError(f"RoPE over {dim} dimensions of a head is impossible: it rotates pairs")
    if rope.kind == "linear":
        return _plain(rope.theta, dim) / rope.factor, 1.0
    if rope.kind == "dynamic":
        return _plain(_stretched_theta(rope, dim, length), dim), 1.0
    if rope.kind == "llama3":
        return _llama3(rope, dim), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, dim)
    if rope.kind == "longrope":
        return _longrope(rope, dim, length)
    return _plain(rope.theta, dim), 1.0


def _exponents(dim: int) -> torch.Tensor:
    return torch.arange(0, dim, 2, dtype=torch.float32) / dim


def _plain(theta: float, dim: int) -> torch.Tensor:
    return 1.0 / theta ** _exponents(dim)


def _stretched_theta(rope: RopeConfig, dim: int, length: int) -> float:
    if dim <= 2:
        raise ModelError("dynamic RoPE needs more than two rotated dimensions in a head")
    reach = max(length, rope.max_position_embeddings) / rope.max_position_embeddings
    return rope.theta * (rope.factor * reach - (rope.factor - 1)) ** (dim / (dim - 2))


def _llama3(rope: RopeConfig, dim: int) -> torch.Tensor:
    """Slow frequencies divided by the factor, fast ones kept, a linear blend in between."""
    plain = _plain(rope.theta, dim)
    turns = rope.original_max_position_embeddings * plain / (2 * math.pi)  # in the old context
    low, high = rope.low_freq_factor, rope.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return plain * kept + plain / rope.factor * (1 - kept)


def _yarn(rope: RopeConfig, dim: int) -> tuple[torch.Tensor, float]:
    """Frequencies below beta_slow turns in the old context are divided, above beta_fast kept."""

    def dimension_of(turns: float) -> float:
        length = rope.original_max_position_embeddings
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low or 0.001
    divided = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    plain = _plain(rope.theta, dim)
    return plain * (1 - divided) + plain / rope.factor * divided, _yarn_scale(rope)


def _yarn_scale(rope: RopeConfig) -> float:
    def magnitude(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return magnitude(1.0)


def _longrope(rope: RopeConfig, dim: int, length: int) -> tuple[torch.Tensor, float]:
    """Each frequency divided by a factor of its own, from one of two lists."""
    original = rope.original_max_position_embeddings
    factors = rope.long_factor if length > original else rope.short_factor
    if len(factors) != dim // 2:
        raise ModelError(
            f"RoPE of type longrope has {len(factors)} factors in config.json, but {dim // 2} "
            "frequencies"
        )
    scale = rope.attention_factor
    if scale is None:
        stretch = max(rope.factor, 1.0)
        scale = math.sqrt(1 + math.log(stretch) / math.log(original))
    return 1.0 / (torch.tensor(factors) * rope.theta ** _exponents(dim)), scale
