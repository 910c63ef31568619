"""Qwen3: Llama with a norm over each head's query and key, and Qwen2's windows."""

from __future__ import annotations

from headgate.shard.model_config import ModelConfig
from headgate.shard.models.llama import LayerOptions, LlamaForCausalLM
from headgate.shard.models.qwen2 import window_of
from headgate.shard.models.registry import register


@register("Qwen3ForCausalLM")
class Qwen3ForCausalLM(LlamaForCausalLM):
    """Differs from Llama in its layers' options only."""

    @staticmethod
    def layer_options(config: ModelConfig, index: int) -> LayerOptions:
        bias = bool(config.extra.get("attention_bias"))
        return LayerOptions(
            qkv_bias=bias, output_bias=bias, qk_norm=True, window=window_of(config, index)
        )
