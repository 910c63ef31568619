"""What a token costs with a grammar, over the embedded model's vocabulary.

`python -m pytest -s tests/parity/test_grammar_cost.py` prints it.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

import numpy as np
import pytest
from llguidance import LLMatcher

from headgate.grammar_engine import load_tokenizer
from headgate.launcher.embedded_model import ensure_embedded_model
from headgate.router.grammar import Grammar
from headgate.router.grammar_source import to_source
from headgate.shard.sampling.grammar import ConstrainedRow, GrammarMasks, RowGrammar

VOCAB_SIZE, EOS = 49152, 2
_TEXT = {"type": "string"}
_CITY = {"type": "object", "properties": {"city": _TEXT, "unit": {"enum": ["celsius", "kelvin"]}}}
SCHEMAS: dict[str, tuple[Grammar, str]] = {
    "any JSON object": (
        Grammar("json_object", True),
        json.dumps({"name": "Ada Lovelace", "tags": ["math", "engine"], "born": 1815}),
    ),
    "person": (
        Grammar("json_schema", json.dumps({
            "type": "object", "required": ["name", "age"], "additionalProperties": False,
            "properties": {"name": _TEXT, "age": {"type": "integer", "minimum": 0, "maximum": 150},
                           "mail": {"type": "string", "format": "email"}},
        })),
        json.dumps({"name": "Ada Lovelace", "age": 36, "mail": "ada@example.com"}, indent=2),
    ),
    "tool call": (
        Grammar("json_schema", json.dumps({
            "type": "object", "required": ["name", "arguments"],
            "properties": {"name": {"const": "get_weather"}, "arguments": _CITY},
        })),
        json.dumps({"name": "get_weather", "arguments": {"city": "Reykjavík", "unit": "celsius"}},
                   ensure_ascii=False),
    ),
    "recursive": (
        Grammar("json_schema", json.dumps({
            "type": "object", "required": ["v"], "properties": {
                "v": _TEXT, "children": {"type": "array", "items": {"$ref": "#"}}},
        })),
        json.dumps({"v": "root", "children": [{"v": "leaf one"}, {"v": "two", "children": []}]}),
    ),
    "regex": (Grammar("regex", r"[a-z.]+@[a-z]+\.(com|org)"), "someone.new@example.org"),
    "name": (Grammar("regex", "[a-zA-Z0-9_-]{3,64}"), "some-Name_12"),
    "choice": (Grammar("choice", ("positive", "negative", "neutral")), "negative"),
}  # fmt: skip


@dataclass(frozen=True)
class Cost:
    compile_ms: float
    cold_us: list[float]  # a mask for each token of the grammar's first row, which builds tables
    warm_us: list[float]  # of later rows: reading the token before, and the mask as booleans


def cost_of(masks: GrammarMasks, source: str, tokens: list[int]) -> Cost:
    started = time.perf_counter()
    masks.prepare(source).result()
    compiled = time.perf_counter()
    output = np.array(tokens, np.int32)

    def walk() -> list[float]:
        grammar, times = RowGrammar(source), []
        for length in range(len(tokens) + 1):
            row = ConstrainedRow(0, grammar, output[:length])
            begin = time.perf_counter()
            found = masks._fill([row], {source: masks.prepare(source)})
            times.append(1e6 * (time.perf_counter() - begin))
            assert not found.failures, found.failures
            wanted = tokens[length] if length < len(tokens) else EOS
            assert found.allowed[0][wanted]
        return times

    first, *others = [walk() for _ in range(6)]
    best = [min(times) for times in zip(*others, strict=True)]
    return Cost(1e3 * (compiled - started), first, best)


@pytest.fixture(scope="module")
def masks() -> GrammarMasks:
    masks = GrammarMasks(str(ensure_embedded_model()), VOCAB_SIZE, [EOS], num_threads=1)
    masks.prepare(LLMatcher.grammar_from_regex("x")).result()  # loads the vocabulary
    return masks


def test_cost_of_a_token(masks: GrammarMasks) -> None:
    tokenizer = load_tokenizer(ensure_embedded_model(), VOCAB_SIZE, [EOS])
    print(f"\n{'microseconds':16} {'compile ms':>10} {'cold':>7} {'warm':>7} {'warm worst':>10}")
    for name, (grammar, answer) in SCHEMAS.items():
        tokens: Any = tokenizer.tokenize_str(answer)
        cost = cost_of(masks, to_source(grammar, tokenizer), tokens)
        typical = median(cost.warm_us)
        print(
            f"{name:16} {cost.compile_ms:10.1f} {mean(cost.cold_us):7.1f} {typical:7.1f} "
            f"{max(cost.warm_us):10.1f}"
        )
        assert typical < 500, "ten times what it should be, on a machine however busy"
