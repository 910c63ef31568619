"""The embedded model's rebuilt tokenizer against two that share no code with the conversion.

One is byte-level BPE spelt out below from the file's metadata: special tokens first, then single
digits, then GPT-2's words, then merges by rank over bytes. The other is llama.cpp's, whose ids
lie in llama_cpp_tokens.json.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import regex
from gguf import GGUFReader
from tokenizers import Tokenizer

from headgate.launcher.embedded_model import ensure_embedded_model, find_embedded_gguf

DIGIT = regex.compile(r"\p{N}")
WORD = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)")
CONTROL, USER_DEFINED = 3, 4
LLAMA_CPP = json.loads(Path(__file__).with_name("llama_cpp_tokens.json").read_text("utf-8"))

TEXTS = [
    "Hello, world!",
    "What is the capital of Japan?",
    "In 2024, 3.14159 and 1,000,000 are numbers.",
    "x² + ½ = Ⅷ٣",
    "It's what they'd've said: I'LL, we're, you're.",
    "  two  spaces   and a tail  ",
    "line\nbreaks\n\n\nand\ttabs\t\t.",
    "\r\n windows\r\n",
    "def f(x: int) -> int:\n    return x ** 2  # square\n",
    "for (int i = 0; i < 10; ++i) { a[i] = '\\0'; }",
    "Привет, как дела?",
    "東京は日本の首都です。",
    "안녕하세요 세계",
    "مرحبا بالعالم",
    "हिन्दी में नमस्ते",
    "naïve café — “quoted” … ‘so’",
    "cafe\u0301 combining, a\u00a0no-break space",
    "😀 🙂👩‍👩‍👧 🇯🇵 flags",
    "zero\u200bwidth\u200djoiner",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|>text<|endoftext|>",
    "<|im_start |> is no token, <|im_end|>is",
    "ALLCAPS camelCase snake_case kebab-case",
    "https://example.com/a?b=1&c=%20d#e",
    "user@example.com +49 (0)30 1234-5678",
    "\\frac{a}{b} $x_1^2$ ∑∞",
    "!!!???...---===***",
    "a" * 200,
    " " * 50 + "x",
    "\x01\x02control\x7f",
    "",
    "\n",
]


@dataclass(frozen=True)
class Reference:
    """What the file says about its tokens."""

    ids: dict[str, int]
    ranks: dict[tuple[str, str], int]
    special: regex.Pattern[str]
    alphabet: list[str]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, special tokens recognised, none added."""
        ids: list[int] = []
        for piece in self.special.split(text):
            if self.special.fullmatch(piece):
                ids.append(self.ids[piece])
                continue
            for part in cut(DIGIT, piece):
                for word in cut(WORD, part):
                    ids += self.encode_word(word)
        return ids

    def encode_word(self, word: str) -> list[int]:
        parts = [self.alphabet[byte] for byte in word.encode()]
        while len(parts) > 1:
            ranked = [
                (self.ranks.get((parts[i], parts[i + 1]), len(self.ranks)), i)
                for i in range(len(parts) - 1)
            ]
            rank, i = min(ranked)
            if rank == len(self.ranks):
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return [self.ids[part] for part in parts if part in self.ids]


def cut(pattern: regex.Pattern[str], text: str) -> list[str]:
    """The matches and what lies between them."""
    pieces, end = [], 0
    for match in pattern.finditer(text):
        pieces += [text[end : match.start()], match.group()]
        end = match.end()
    return [piece for piece in [*pieces, text[end:]] if piece]


@pytest.fixture(scope="module")
def reference() -> Reference:
    fields = GGUFReader(find_embedded_gguf()[0]).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    types = fields["tokenizer.ggml.token_type"].contents()
    special = [t for t, kind in zip(tokens, types, strict=True) if kind in (CONTROL, USER_DEFINED)]
    merges = fields["tokenizer.ggml.merges"].contents()
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return Reference(
        ids={token: i for i, token in enumerate(tokens)},
        ranks={tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)},
        special=regex.compile("(" + "|".join(map(regex.escape, special)) + ")"),
        alphabet=[chr(b) if b in shown else chr(256 + hidden.index(b)) for b in range(256)],
    )


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(ensure_embedded_model() / "tokenizer.json"))


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_the_reference(
    tokenizer: Tokenizer, reference: Reference, text: str
) -> None:
    assert tokenizer.encode(text).ids == reference.encode(text)


def test_ids_of_random_texts(tokenizer: Tokenizer, reference: Reference) -> None:
    chance = random.Random(0)
    letters = "aeT'sll 019 \n\t.,-_é東🙂٣ " + "".join(map(chr, range(0x1F0, 0x250)))
    for _ in range(500):
        text = "".join(chance.choices(letters, k=chance.randint(1, 60)))
        assert tokenizer.encode(text).ids == reference.encode(text), text


@pytest.mark.parametrize("case", LLAMA_CPP["texts"], ids=lambda case: ascii(case["text"][:24]))
def test_ids_are_those_of_llama_cpp(tokenizer: Tokenizer, case: dict[str, Any]) -> None:
    assert tokenizer.encode(case["text"], add_special_tokens=False).ids == case["ids"]


def test_bytes_the_vocabulary_lacks_are_as_if_they_were_not_there(tokenizer: Tokenizer) -> None:
    # Here llama.cpp differs: it drops them after merging, so that they keep neighbours apart.
    # Dropping them before is what a published tokenizer.json without unknown token means.
    assert tokenizer.encode("a.\x1d.b").tokens == ["a", "..", "b"]
    assert tokenizer.encode("\x04\x1d").ids == []


def test_text_comes_back(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        if all(ord(c) > 8 for c in text):  # the vocabulary lacks some control bytes
            assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_digits_stand_alone_and_nothing_is_added(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("2024").tokens == ["2", "0", "2", "4"]
    assert tokenizer.encode("Hello").ids == [tokenizer.token_to_id("Hello")]
    assert tokenizer.encode("<|im_start|>").ids == [1]
    assert tokenizer.encode("<|im_end|>").ids == [2]
    assert tokenizer.get_vocab_size() == 49152


def test_transformers_reads_it_as_it_is(tokenizer: Tokenizer) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(ensure_embedded_model())
    for text in TEXTS:
        assert theirs(text)["input_ids"] == tokenizer.encode(text).ids
    question = [{"role": "user", "content": "Hi"}]
    assert theirs.apply_chat_template(question, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_settings(tokenizer: Tokenizer) -> None:
    settings = json.loads((ensure_embedded_model() / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["add_bos_token"] is False
    assert settings["eos_token"] == "<|im_end|>"
