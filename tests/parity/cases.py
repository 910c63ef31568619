"""The tiny models of the parity tests: each is here for something that could go wrong by itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 24,
    "short_factor": [1.0, 1.1, 1.2, 1.5],
    "long_factor": [1.0, 2.0, 3.5, 6.0],
}
KERNELS = ("reference", "cpu")
PROMPT_LENGTH = 40  # of the longest prompt


@dataclass(frozen=True)
class Case:
    """A checkpoint, and the longest sequence its server would admit (0: the checkpoint's own)."""

    name: str
    architecture: str
    overrides: dict[str, Any] = field(default_factory=dict)
    max_positions: int = 0
    dtype: str = "float32"
    prompt_length: int = PROMPT_LENGTH
    decode_steps: int = 4


def _heads(query: int, key_value: int, dim: int = 8, hidden: int = 0) -> dict[str, Any]:
    return {
        "num_attention_heads": query,
        "num_key_value_heads": key_value,
        "head_dim": dim,
        "hidden_size": hidden or query * dim,
    }


def _rope(name: str, parameters: dict[str, Any], **more: Any) -> Case:
    """A Llama with that RoPE."""
    overrides = {"rope_parameters": parameters, **more.pop("overrides", {})}
    return Case(name, "llama", overrides, **more)


CASES = [
    Case("llama-9-heads-3-groups", "llama"),
    Case("llama-tied", "llama", {"tie_word_embeddings": True}),
    Case("llama-all-biases", "llama", {"attention_bias": True, "mlp_bias": True}),
    Case("llama-mqa", "llama", _heads(4, 1)),
    Case("llama-2-groups-of-2", "llama", _heads(4, 2)),
    Case("llama-5-full-heads", "llama", _heads(5, 5)),
    Case("llama-wide-heads", "llama", _heads(6, 3, dim=16, hidden=48)),
    Case("llama-bfloat16", "llama", dtype="bfloat16"),
    Case("llama-gelu", "llama", {"hidden_act": "gelu_pytorch_tanh"}),
    Case("mistral-window", "mistral", {"sliding_window": 9}),
    Case("mistral-no-window", "mistral", {"sliding_window": None, **_heads(8, 2)}),
    Case("qwen2", "qwen2", {"tie_word_embeddings": True}),
    Case(
        "qwen2-upper-windows",
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 1,
            "num_hidden_layers": 3,
        },
    ),
    Case("qwen3", "qwen3", _heads(6, 2, dim=16, hidden=64)),
    Case(
        "qwen3-bias-layer-types",
        "qwen3",
        {
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    _rope("rope-theta", {"rope_type": "default", "rope_theta": 500.0}),
    _rope("rope-linear", LINEAR),
    _rope("rope-llama3", LLAMA3),
    _rope("rope-yarn", YARN),
    _rope("rope-yarn-mscale", {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False}),
    # Where Transformers' definition by the sequence at hand and ours by the longest one coincide:
    _rope("rope-dynamic-unstretched", DYNAMIC),
    _rope(
        "rope-dynamic-stretched",
        DYNAMIC,
        overrides={"max_position_embeddings": 16},
        max_positions=PROMPT_LENGTH,
        decode_steps=0,
    ),
    _rope("rope-longrope-short", LONGROPE, max_positions=24, prompt_length=20),
    _rope("rope-longrope-long", LONGROPE, max_positions=512),
]

# Cases that are also quantised: every family, tied and untied, biases, groups that no cut falls on.
QUANTISED = [
    ("llama-9-heads-3-groups", "int8"),
    ("llama-9-heads-3-groups", "int8-weight-only"),
    ("llama-9-heads-3-groups", "int4"),
    ("llama-tied", "int4"),
    ("llama-all-biases", "int8"),
    ("mistral-no-window", "int4"),
    ("qwen2", "int8"),
    ("qwen2", "int8-weight-only"),
    ("qwen3", "int8"),
    ("qwen3", "int4"),
]
