"""A checkpoint directory as the launcher sees one, without torch: config.json and real headers."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 12,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "num_hidden_layers": 1,
    "intermediate_size": 16,
    "vocab_size": 32,
    "max_position_embeddings": 64,
    "torch_dtype": "float32",
}


def safetensors(shapes: dict[str, tuple[int, ...]]) -> bytes:
    """A file of float32 zeros."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(end)


def model_files() -> dict[str, bytes]:
    """File names and contents of a whole model."""
    return {
        "config.json": json.dumps(CONFIG).encode(),
        "tokenizer_config.json": b'{"chat_template": "{{ messages }}"}',
        "model.safetensors": safetensors({"model.embed_tokens.weight": (32, 12)}),
    }


def write_model(directory: Path, files: dict[str, bytes] | None = None) -> Path:
    """Writes a model and returns its directory."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in (files or model_files()).items():
        (directory / name).write_bytes(data)
    return directory
