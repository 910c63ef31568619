"""The requests of the benchmark: made from two seeds, the same for every server and every time.

Lengths come from one seed alone, words from both, so that runs with words of their own have the
same lengths to the token: no prefix cache answers a run out of an earlier one. Prompts are
English-like sentences, cut to an exact number of tokens.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import tokenizers

DEFAULT = "default"
SHARED_PREFIX = "shared-prefix"
WORKLOADS = (DEFAULT, SHARED_PREFIX)
PREFIX_TOKENS = 600
SEED = 1  # of the lengths, in every run
SHORTEST_WARM_UP = 16  # tokens of a warm-up's answer, at most
# The warm-up's words and lengths are no run's.
_WARM_UP_SEED, _WARM_UP_WORDS = 777, 12345
_MAX_TRIES = 50

_WORDS: dict[str, list[str]] = json.loads(Path(__file__).with_name("words.json").read_text())
_ARTICLES = ("the", "a", "every", "that", "this", "one", "another", "their", "our", "some")
_ENDS = (".", ".", ".", ".", "?", "!")


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """One prompt and the exact number of tokens to generate."""

    prompt: str
    prompt_tokens: int
    output_tokens: int


class Case(NamedTuple):
    """One entry of a plan."""

    workload: str
    concurrency: int
    requests: int


def parse_plan(text: str) -> list[Case]:
    """Of workload:concurrency:requests, ... Raises ValueError."""
    return [_parse_case(entry) for entry in text.split(",")]


def _parse_case(text: str) -> Case:
    words = text.split(":")
    if len(words) != 3 or words[0] not in WORKLOADS or not all(w.isdigit() for w in words[1:]):
        raise ValueError(f"--plan: {text} is not workload:concurrency:requests")
    return Case(words[0], int(words[1]), int(words[2]))


def make_requests(
    workload: str, count: int, seed: int, words_seed: int, tokenizer: tokenizers.Tokenizer
) -> list[BenchRequest]:
    """`count` requests.

    default: prompts of 16-64 tokens (40 %), 100-200 (40 %) or 400-600 (20 %). shared-prefix: one
    prefix of 600 tokens, then 20-60 of each request's own. Answers of 32-128 tokens in both.
    """
    lengths = random.Random(f"lengths-{workload}-{seed}")
    writer = _Writer(random.Random(f"words-{workload}-{seed}-{words_seed}"), tokenizer)
    shared = workload == SHARED_PREFIX
    prefix = writer.text(PREFIX_TOKENS) if shared else ""
    requests = []
    for _ in range(count):
        if shared:
            prompt = prefix + writer.text(lengths.randint(20, 60), lead=" ")
            tokens = len(writer.encode(prompt))
        else:
            tokens = _prompt_length(lengths)
            prompt = writer.text(tokens)
        requests.append(BenchRequest(prompt, tokens, lengths.randint(32, 128)))
    return requests


def make_warm_up(
    count: int, seed: int, words_seed: int, tokenizer: tokenizers.Tokenizer
) -> list[BenchRequest]:
    """Short answers to prompts of the default workload, to be sent before the clock starts."""
    requests = make_requests(
        DEFAULT, count, seed + _WARM_UP_SEED, words_seed + _WARM_UP_WORDS, tokenizer
    )
    return [
        BenchRequest(
            request.prompt, request.prompt_tokens, min(request.output_tokens, SHORTEST_WARM_UP)
        )
        for request in requests
    ]


def _prompt_length(lengths: random.Random) -> int:
    kind = lengths.random()
    if kind < 0.4:
        return lengths.randint(16, 64)
    if kind < 0.8:
        return lengths.randint(100, 200)
    return lengths.randint(400, 600)


class _Writer:
    """Sentences out of a random generator. The order of its draws is the workload."""

    def __init__(self, draw: random.Random, tokenizer: tokenizers.Tokenizer) -> None:
        self._draw = draw
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def text(self, tokens: int, lead: str = "") -> str:
        """Text of exactly `tokens` tokens by itself. Raises RuntimeError where none is found."""
        for _ in range(_MAX_TRIES):
            written = lead + " ".join(self._sentence() for _ in range(tokens // 5 + 4))
            ids = self.encode(written)
            if len(ids) < tokens:
                continue
            cut: str = self._tokenizer.decode(ids[:tokens], skip_special_tokens=False)
            if len(self.encode(cut)) == tokens:
                return cut
        raise RuntimeError(f"this tokenizer makes no prompt of {tokens} tokens")

    def _sentence(self) -> str:
        choice = self._draw.choice
        text = self._clause()
        if self._often(0.5):
            text += f", {choice(_WORDS['conjunctions'])} {self._clause()}"
        return text[0].upper() + text[1:] + choice(_ENDS)

    def _clause(self) -> str:
        choice = self._draw.choice
        text = f"{self._thing()} {choice(_WORDS['verbs'])} {self._thing()}"
        if self._often(0.6):
            text += f" {choice(_WORDS['prepositions'])} {self._thing()}"
        if self._often(0.4):
            text = f"{choice(_WORDS['adverbs'])} {text}"
        return text

    def _thing(self) -> str:
        choice: Callable[..., str] = self._draw.choice
        article = choice(_ARTICLES)
        adjective = choice(_WORDS["adjectives"]) + " " if self._often(0.6) else ""
        return f"{article} {adjective}{choice(_WORDS['nouns'])}"

    def _often(self, share: float) -> bool:
        return self._draw.random() < share
