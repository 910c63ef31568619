"""Qwen2: Llama with biases on queries, keys and values, and windows on its upper layers at wish."""

from __future__ import annotations

from headgate.shard.model_config import ModelConfig
from headgate.shard.models.llama import LayerOptions, LlamaForCausalLM
from headgate.shard.models.registry import register

_DEFAULT_WINDOW = 4096
_DEFAULT_FULL_LAYERS = 28


def window_of(config: ModelConfig, index: int) -> int:
    """Layer `index`'s window, or 0: by "layer_types", else from layer "max_window_layers" on."""
    extra = config.extra
    if not extra.get("use_sliding_window"):
        return 0
    layer_types = extra.get("layer_types")
    if layer_types:
        slides = layer_types[index] == "sliding_attention"
    else:
        slides = index >= extra.get("max_window_layers", _DEFAULT_FULL_LAYERS)
    return (extra.get("sliding_window", _DEFAULT_WINDOW) or 0) if slides else 0


@register("Qwen2ForCausalLM")
class Qwen2ForCausalLM(LlamaForCausalLM):
    """Differs from Llama in its layers' options only."""

    @staticmethod
    def layer_options(config: ModelConfig, index: int) -> LayerOptions:
        return LayerOptions(qkv_bias=True, window=window_of(config, index))
