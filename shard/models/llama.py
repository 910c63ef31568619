"""Llama, and the shape that its descendants share: they differ in what `layer_options` says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from headgate.kernels.int8_cache import PagedCache
from headgate.shard.attention_metadata import AttentionMetadata
from headgate.shard.layers.attention import Attention
from headgate.shard.layers.embedding import VocabEmbedding, VocabHead
from headgate.shard.layers.mlp import GatedMLP
from headgate.shard.layers.norm import RMSNorm
from headgate.shard.layers.rotary import RotaryEmbedding
from headgate.shard.load_context import LoadContext
from headgate.shard.model_config import ModelConfig
from headgate.shard.models.base import CausalLM
from headgate.shard.models.registry import register

if TYPE_CHECKING:
    from headgate.shard.kv_cache import KVCache


@dataclass(frozen=True, slots=True)
class LayerOptions:
    """Where the families differ."""

    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head's query and key
    window: int = 0  # positions a token sees; 0: all before it


class DecoderLayer:
    """Attention and MLP, each on the normed sum of all before it."""

    def __init__(
        self, context: LoadContext, index: int, rotary: RotaryEmbedding, options: LayerOptions
    ) -> None:
        prefix, hidden = f"model.layers.{index}", context.config.hidden_size
        self.attention = Attention(
            context,
            f"{prefix}.self_attn",
            RMSNorm(context, f"{prefix}.input_layernorm", hidden),
            rotary,
            qkv_bias=options.qkv_bias,
            output_bias=options.output_bias,
            qk_norm=options.qk_norm,
            window=options.window,
        )
        norm = RMSNorm(context, f"{prefix}.post_attention_layernorm", hidden)
        self.mlp = GatedMLP(context, f"{prefix}.mlp", norm, options.mlp_bias)

    def __call__(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        positions: torch.Tensor,
        kv: tuple[PagedCache, PagedCache],
        attention: AttentionMetadata,
        wanted: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(the MLP's output, the sum of all before it), of the `wanted` tokens or of all; the next
        norm adds the two."""
        x, residual = self.attention(x, residual, positions, kv, attention, wanted)
        return self.mlp(x, residual)


@register("LlamaForCausalLM")
class LlamaForCausalLM(CausalLM):
    """A stack of decoder layers between an embedding and a head, which may share their weights."""

    def __init__(self, context: LoadContext) -> None:
        super().__init__(context)
        config = context.config
        self.rotary = RotaryEmbedding(
            config.rope, config.head_dim, context.max_positions, self.device
        )
        self.embedding = VocabEmbedding(context, "model.embed_tokens.weight")
        self.layers = [
            DecoderLayer(context, index, self.rotary, self.layer_options(config, index))
            for index in range(config.num_layers)
        ]
        self.norm = RMSNorm(context, "model.norm", config.hidden_size)
        tied = self.embedding if config.tie_word_embeddings else None
        self.head = VocabHead(context, "lm_head.weight", tied)

    @staticmethod
    def layer_options(config: ModelConfig, index: int) -> LayerOptions:
        """What layer `index` has beyond the common shape."""
        bias = bool(config.extra.get("attention_bias"))
        return LayerOptions(
            qkv_bias=bias, output_bias=bias, mlp_bias=bool(config.extra.get("mlp_bias"))
        )

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_cache: KVCache,
        attention: AttentionMetadata,
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self.check_lengths(attention)
        x, residual = self.embedding(input_ids), None
        last = self.layers[-1]
        for layer, kv in zip(self.layers, kv_cache.layers, strict=True):
            self.heartbeat()
            of = wanted if layer is last else None
            x, residual = layer(x, residual, positions, kv, attention, of)
        assert residual is not None, "a model has at least one layer"
        return self.norm.add(x, residual)[0]
