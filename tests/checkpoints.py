"""Tiny random checkpoints with a tokenizer, made with Transformers, for tests of every kind.

A checkpoint is as complete as a published one: config.json, generation_config.json, safetensors,
tokenizer.json, tokenizer_config.json with a ChatML template. It knows nothing: its text is noise
(often not even UTF-8), which is what detokenisers must survive. Not for production code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)  # every byte, then the special tokens
END_OF_TEXT, IM_START, IM_END = (256 + index for index in range(len(SPECIAL_TOKENS)))

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# 9 heads in 3 groups: nothing divides by 2. Small enough that a forward pass takes a millisecond.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 72,
    "intermediate_size": 190,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 512,
    # Wide enough that the best two logits are seldom close, so that greedy text is stable.
    "initializer_range": 0.25,
    "tie_word_embeddings": False,
    "bos_token_id": END_OF_TEXT,
    "eos_token_id": IM_END,
    "pad_token_id": END_OF_TEXT,
}


def make_checkpoint(
    directory: str | Path,
    architecture: str = "llama",
    *,
    seed: int = 0,
    dtype: str = "float32",
    max_shard_size: str | int = "1GB",
    **overrides: Any,
) -> Path:
    """Writes a random checkpoint of `architecture`, a Transformers model type; returns its path.

    `overrides` are fields of the Transformers config. The same arguments give the same weights.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.for_model(architecture, **{**_DEFAULTS, **overrides})
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Transformers starts biases at 0 and norms at 1, which would hide their absence.
                if name.endswith("bias"):
                    parameter.normal_(0.0, 0.2)
                elif "norm" in name:
                    parameter.uniform_(0.5, 1.5)
    finally:
        torch.random.set_rng_state(state)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(path, max_shard_size=max_shard_size)
    write_tokenizer(path)
    return path


def write_tokenizer(path: Path) -> None:
    """A byte-level BPE without merges: token n is byte n, so a text's ids are its bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab = {character: byte for byte, character in enumerate(_byte_alphabet())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "model_max_length": 512,
                "bos_token": SPECIAL_TOKENS[0],
                "eos_token": SPECIAL_TOKENS[2],
                "pad_token": SPECIAL_TOKENS[0],
                "clean_up_tokenization_spaces": False,
                "chat_template": CHAT_TEMPLATE,
            },
            indent=2,
        )
    )


def _byte_alphabet() -> list[str]:
    """The printable character that byte-level tokenizers write for each byte, in byte order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    alphabet, spare = [], 0x100
    for byte in range(256):
        if byte in printable:
            alphabet.append(chr(byte))
        else:
            alphabet.append(chr(spare))
            spare += 1
    return alphabet
