"""Tiny .gguf files made on the spot, and the weights that a correct conversion gives back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

HEADS, KV_HEADS, HEAD_DIM, LAYERS, MLP, VOCAB = 4, 2, 16, 2, 96, 300
HIDDEN = HEADS * HEAD_DIM

_LAYER_SHAPES = {
    "self_attn.q_proj": ("attn_q", (HEADS * HEAD_DIM, HIDDEN)),
    "self_attn.k_proj": ("attn_k", (KV_HEADS * HEAD_DIM, HIDDEN)),
    "self_attn.v_proj": ("attn_v", (KV_HEADS * HEAD_DIM, HIDDEN)),
    "self_attn.o_proj": ("attn_output", (HIDDEN, HEADS * HEAD_DIM)),
    "mlp.gate_proj": ("ffn_gate", (MLP, HIDDEN)),
    "mlp.up_proj": ("ffn_up", (MLP, HIDDEN)),
    "mlp.down_proj": ("ffn_down", (HIDDEN, MLP)),
    "input_layernorm": ("attn_norm", (HIDDEN,)),
    "post_attention_layernorm": ("ffn_norm", (HIDDEN,)),
}


def byte_alphabet() -> list[str]:
    """GPT-2's 256 printable stand-ins for bytes, in the order of the bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (chr(256 + i) for i in range(256 - len(printable)))
    return [chr(b) if b in printable else next(others) for b in range(256)]


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """A published q or k as llama files hold it: rows of the two rotary halves take turns."""
    head_dim = len(weight) // heads
    order = [
        head * head_dim + half * (head_dim // 2) + i
        for head in range(heads)
        for i in range(head_dim // 2)
        for half in range(2)
    ]
    return weight[order]


def write_gguf(
    path: Path,
    *,
    arch: str = "llama",
    tied: bool = True,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    metadata: dict[str, Any] | None = None,
    extra_tensors: dict[str, np.ndarray] | None = None,
    without: tuple[str, ...] = (),
) -> dict[str, np.ndarray]:
    """Writes a model of random weights; returns them as published (float32, unquantised).

    `metadata` adds to or, with None, takes from the defaults; `without` names tensors left out.
    """
    random = np.random.default_rng(0)
    published: dict[str, np.ndarray] = {}
    writer = GGUFWriter(path, arch)

    def add(name: str, file_name: str, shape: tuple[int, ...]) -> None:
        value = random.standard_normal(shape).astype(np.float32)
        published[name] = value
        if file_name in without:
            return
        if arch == "llama" and ".attn_q." in file_name:
            value = interleave(value, HEADS)
        if arch == "llama" and ".attn_k." in file_name:
            value = interleave(value, KV_HEADS)
        if len(shape) == 2 and kind is not GGMLQuantizationType.F32:
            writer.add_tensor(file_name, quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(file_name, value)

    _add_metadata(writer, arch, metadata or {})
    add("model.embed_tokens.weight", "token_embd.weight", (VOCAB, HIDDEN))
    add("model.norm.weight", "output_norm.weight", (HIDDEN,))
    if not tied:
        add("lm_head.weight", "output.weight", (VOCAB, HIDDEN))
    for layer in range(LAYERS):
        for name, (file_name, shape) in _LAYER_SHAPES.items():
            prefix, file_prefix = f"model.layers.{layer}.{name}", f"blk.{layer}.{file_name}"
            add(f"{prefix}.weight", f"{file_prefix}.weight", shape)
            if arch == "qwen2" and file_name in ("attn_q", "attn_k", "attn_v"):
                add(f"{prefix}.bias", f"{file_prefix}.bias", shape[:1])
        if arch == "qwen3":
            for part in "qk":
                add(
                    f"model.layers.{layer}.self_attn.{part}_norm.weight",
                    f"blk.{layer}.attn_{part}_norm.weight",
                    (HEAD_DIM,),
                )
    for name, value in (extra_tensors or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return published


def _add_metadata(writer: GGUFWriter, arch: str, changes: dict[str, Any]) -> None:
    alphabet = byte_alphabet()
    words = ["he", "ll", "hell", "hello", "Ġt", "Ġth", "Ġthe"]
    merges = ["Ġ t", "Ġt h", "Ġth e", "h e", "l l", "he ll", "hell o"]
    filler = [f"<unused{i}>" for i in range(VOCAB - len(alphabet) - len(words) - 3)]
    tokens = [*alphabet, *words, *filler, "<s>", "</s>", "<tool>"]
    types = [1] * (256 + len(words)) + [5] * len(filler) + [3, 3, 4]
    values: dict[str, Any] = {
        f"{arch}.block_count": LAYERS,
        f"{arch}.context_length": 512,
        f"{arch}.embedding_length": HIDDEN,
        f"{arch}.feed_forward_length": MLP,
        f"{arch}.attention.head_count": HEADS,
        f"{arch}.attention.head_count_kv": KV_HEADS,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{arch}.rope.freq_base": 50000.0,
        f"{arch}.rope.dimension_count": HEAD_DIM,
        f"{arch}.attention.key_length": HEAD_DIM,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": VOCAB - 3,
        "tokenizer.ggml.eos_token_id": VOCAB - 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ messages[0].content }}",
        **changes,
    }
    for key, value in values.items():
        if value is None:
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
