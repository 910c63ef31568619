"""Rebuilds a model's tokenizer from the metadata of its .gguf file.

Written as tokenizer.json and tokenizer_config.json, so that the rest of Headgate sees an ordinary
checkpoint. Nothing is guessed: a pre-tokenizer this file does not know is an error.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headgate.launcher.gguf_file import GgufError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Metadata = Mapping[str, Any]

SPACE = "\u2581"  # SentencePiece's visible space

GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_WORDS = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{TAIL}"
QWEN2_WORDS = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{TAIL}"
# What files from before there was a `tokenizer.ggml.pre` are read with.
DEFAULT_STEPS = (r"[\p{P}\$\+<=>\^~\|]+", GPT2_WORDS, r"\p{N}+", r"[0-9][0-9][0-9]")

# `tokenizer.ggml.pre` -> patterns that cut a text into words, each within the pieces of the last
PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "default": DEFAULT_STEPS,
    "gpt-2": (GPT2_WORDS,),
    "smollm": (r"\p{N}", GPT2_WORDS),
    "starcoder": (r"\p{N}", GPT2_WORDS),
    "llama-bpe": (LLAMA3_WORDS,),
    "llama3": (LLAMA3_WORDS,),
    "llama-v3": (LLAMA3_WORDS,),
    "qwen2": (QWEN2_WORDS,),
    "deepseek-r1-qwen": (QWEN2_WORDS,),
}
LLAMA3_KINDS = ("llama-bpe", "llama3", "llama-v3")  # whole words of the vocabulary win over merges


class TokenType(IntEnum):
    """The kinds in `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def write_tokenizer(directory: Path, metadata: Metadata, config: Mapping[str, Any]) -> None:
    """Writes tokenizer.json and tokenizer_config.json (with the chat template) into `directory`.

    `config` is the model's config.json. Raises GgufError for a kind that is not supported.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in BUILDERS:
        raise GgufError(
            f"tokenizer model {kind!r} is not supported "
            f"(of GGUF files: {', '.join(sorted(BUILDERS))})"
        )
    if (needed := _missing(metadata, kind)) is not None:
        raise GgufError(f"metadata {needed} is missing, without which there is no tokenizer")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types = metadata.get("tokenizer.ggml.token_type") or [TokenType.NORMAL] * len(tokens)
    if not len(tokens) == len(types) <= config["vocab_size"]:
        raise GgufError(
            f"{len(tokens)} tokens, {len(types)} token types and {config['vocab_size']} rows of "
            "embeddings do not belong together"
        )
    try:
        tokenizer, add_bos = BUILDERS[kind](metadata, tokens, types)
    except Exception as error:  # the tokenizers package has no error type of its own
        if isinstance(error, GgufError):
            raise
        raise GgufError(f"the tokenizer's metadata contradicts itself ({error})") from error
    add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", add_bos))
    add_eos = bool(metadata.get("tokenizer.ggml.add_eos_token", False))
    _add_special_tokens(tokenizer, tokens, types)
    _surround(tokenizer, tokens, metadata, add_bos, add_eos)
    tokenizer.save(str(directory / "tokenizer.json"))

    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": add_bos,
        "add_eos_token": add_eos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None and int(token_id) < len(tokens):
            settings[f"{name}_token"] = tokens[int(token_id)]
    if (template := _chat_template(metadata)) is not None:
        settings["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(
        json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def _missing(metadata: Metadata, kind: str) -> str | None:
    needed = ["tokens", "merges"] if kind == "gpt2" else ["tokens", "scores"]
    keys = (f"tokenizer.ggml.{name}" for name in needed)
    return next((key for key in keys if key not in metadata), None)


def _byte_level(metadata: Metadata, tokens: list[str], types: list[int]) -> tuple[Tokenizer, bool]:
    """GPT-2's kind: words of bytes, joined by ranked merges."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in PRE_TOKENIZERS:
        raise GgufError(
            f"pre-tokenizer {pre!r} is not supported "
            f"(of GGUF files: {', '.join(sorted(PRE_TOKENIZERS))})"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    # No unknown token: a byte that the vocabulary lacks is left out, as the models were trained.
    tokenizer = Tokenizer(models.BPE(_ids(tokens), merges, ignore_merges=pre in LLAMA3_KINDS))
    if QWEN2_WORDS in PRE_TOKENIZERS[pre]:
        tokenizer.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[pre]]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, pre in LLAMA3_KINDS


def _sentencepiece(
    metadata: Metadata, tokens: list[str], types: list[int]
) -> tuple[Tokenizer, bool]:
    """SentencePiece's BPE: pieces with scores, unknown characters as byte tokens."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    unknown = int(metadata.get("tokenizer.ggml.unknown_token_id", 0))
    tokenizer = Tokenizer(
        models.BPE(
            _ids(tokens),
            _merges_from_scores(tokens, metadata["tokenizer.ggml.scores"], types),
            unk_token=tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    tokenizer.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend(SPACE)] if prefix else []), normalizers.Replace(" ", SPACE)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if prefix else []),
        ]
    )
    return tokenizer, True


def _merges_from_scores(
    tokens: list[str], scores: list[float], types: list[int]
) -> list[tuple[str, str]]:
    """Ranked merges that join pieces as SentencePiece does: the best-scored result first."""
    ids = {token: i for i, token in enumerate(tokens) if types[i] == TokenType.NORMAL}
    ranked = []
    for token, i in ids.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                ranked.append((-scores[i], i, ids[left], ids[right]))
    ranked.sort()
    return [(tokens[left], tokens[right]) for _, _, left, right in ranked]


BUILDERS: dict[str, Callable[[Metadata, list[str], list[int]], tuple[Tokenizer, bool]]] = {
    "gpt2": _byte_level,
    "llama": _sentencepiece,
}


def _ids(tokens: list[str]) -> dict[str, int]:
    ids: dict[str, int] = {}
    for i, token in enumerate(tokens):
        if token in ids:
            raise GgufError(
                f"token {token!r} is in the vocabulary twice (ids {ids[token]} and {i})"
            )
        ids[token] = i
    return ids


def _add_special_tokens(tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> None:
    from tokenizers import AddedToken

    for kinds, special in (
        ((TokenType.UNKNOWN, TokenType.CONTROL), True),
        ((TokenType.USER_DEFINED,), False),
    ):
        chosen = [
            AddedToken(token, special=special, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in kinds
        ]
        if special:
            tokenizer.add_special_tokens(chosen)
        else:
            tokenizer.add_tokens(chosen)


def _surround(
    tokenizer: Tokenizer, tokens: list[str], metadata: Metadata, add_bos: bool, add_eos: bool
) -> None:
    from tokenizers import processors

    around = [
        (name, int(metadata[f"tokenizer.ggml.{name}_token_id"]))
        for name, wanted in (("bos", add_bos), ("eos", add_eos))
        if wanted and f"tokenizer.ggml.{name}_token_id" in metadata
    ]
    if not around:
        return
    before = [tokens[i] for name, i in around if name == "bos"]
    after = [tokens[i] for name, i in around if name == "eos"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *before, "$B", *after],
        special_tokens=[(tokens[i], i) for _, i in around],
    )


def _chat_template(metadata: Metadata) -> str | list[dict[str, str]] | None:
    default = metadata.get("tokenizer.chat_template")
    named = [
        {"name": name, "template": metadata[f"tokenizer.chat_template.{name}"]}
        for name in metadata.get("tokenizer.chat_templates") or []
    ]
    if not named:
        return default
    return [*([{"name": "default", "template": default}] if default else []), *named]
