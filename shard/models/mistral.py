"""Mistral: Llama with a sliding window on every layer and no biases."""

from __future__ import annotations

from headgate.shard.model_config import ModelConfig
from headgate.shard.models.llama import LayerOptions, LlamaForCausalLM
from headgate.shard.models.registry import register

_DEFAULT_WINDOW = 4096  # where config.json does not mention it; null means none


@register("MistralForCausalLM")
class MistralForCausalLM(LlamaForCausalLM):
    """Differs from Llama in its layers' options only."""

    @staticmethod
    def layer_options(config: ModelConfig, index: int) -> LayerOptions:
        return LayerOptions(window=config.extra.get("sliding_window", _DEFAULT_WINDOW) or 0)
