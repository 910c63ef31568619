"""JSON Schemas: what is generated validates, valid instances are accepted, invalid ones are not."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer

from headgate.grammar_engine import GrammarError, load_tokenizer, new_matcher
from headgate.router.grammar import Grammar
from headgate.router.grammar_source import to_source
from tests.checkpoints import IM_END, VOCAB_SIZE, write_tokenizer
from tests.unit.grammar_cases import FAMILIES, Case

MAX_TOKENS = 600
_WALKS = 3
_ENDING = {ord(character): 12.0 for character in '"}],@'} | {IM_END: 60.0}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> LLTokenizer:
    """Token n is byte n."""
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path)
    return load_tokenizer(path, VOCAB_SIZE, [IM_END])


def matcher_of(tokenizer: LLTokenizer, schema: Any) -> LLMatcher:
    return new_matcher(tokenizer, to_source(Grammar("json_schema", json.dumps(schema)), tokenizer))


def accepts(matcher: LLMatcher, instance: Any, **style: Any) -> bool:
    """Whether the matcher, at its beginning, takes the instance as a whole answer."""
    matcher = matcher.deep_copy()
    text = json.dumps(instance, ensure_ascii=False, **style)
    return matcher.consume_tokens(list(text.encode())) and matcher.is_accepting()


def walk(matcher: LLMatcher, rng: random.Random) -> str | None:
    """A random answer, by random weights that favour what ends it; None: it did not end."""
    matcher, output = matcher.deep_copy(), bytearray()
    for _ in range(MAX_TOKENS):
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        allowed = np.flatnonzero(np.unpackbits(mask, bitorder="little")).tolist()
        assert not matcher.is_error(), matcher.get_error()
        weights = [_ENDING.get(token, 0.05 if token > 127 else 1.0) for token in allowed]
        (token,) = rng.choices(allowed, weights)
        if token == IM_END:
            assert matcher.is_accepting()
            return output.decode()
        assert matcher.consume_token(token)
        output.append(token)
    return None


def test_there_are_many() -> None:
    assert sum(1 for family in FAMILIES.values() for _ in family()) >= 200


@pytest.mark.parametrize("family", FAMILIES)
def test_generated_answers_validate(tokenizer: LLTokenizer, family: str) -> None:
    rng = random.Random(family)
    walks = ended = 0
    for case in FAMILIES[family]():
        matcher = matcher_of(tokenizer, case.schema)
        validator = jsonschema_rs.Draft202012Validator(case.schema, validate_formats=True)
        for _ in range(_WALKS):
            walks += 1
            text = walk(matcher, rng)
            if text is not None:
                ended += 1
                validator.validate(json.loads(text))
    assert ended >= 0.8 * walks, f"{ended} of {walks} ended"


@pytest.mark.parametrize("family", FAMILIES)
def test_instances(tokenizer: LLTokenizer, family: str) -> None:
    for case in FAMILIES[family]():
        _check_cases(case)
        matcher = matcher_of(tokenizer, case.schema)
        for instance in case.valid:
            assert accepts(matcher, instance), (case.schema, instance)
            assert accepts(matcher, instance, indent=2), (case.schema, instance)
            assert accepts(matcher, instance, separators=(",", ":")), (case.schema, instance)
        for instance in case.invalid:
            assert not accepts(matcher, instance), (case.schema, instance)


def _check_cases(case: Case) -> None:
    """The cases themselves are right."""
    validator = jsonschema_rs.Draft202012Validator(case.schema, validate_formats=True)
    assert all(map(validator.is_valid, case.valid)), case
    assert not any(map(validator.is_valid, case.invalid)), case


REFUSED: list[tuple[Any, str]] = [
    ({"not": {"type": "string"}}, "not"),
    ({"if": {"type": "string"}, "then": {"minLength": 1}}, "if"),
    ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    ({"type": "array", "contains": {"type": "string"}}, "contains"),
    ({"type": "object", "propertyNames": {"pattern": "^a"}}, "propertyNames"),
    ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
    ({"type": "object", "unevaluatedProperties": False}, "unevaluatedProperties"),
    ({"type": "array", "unevaluatedItems": False}, "unevaluatedItems"),
    ({"type": "object", "dependentSchemas": {"a": {}}}, "dependentSchemas"),
    ({"type": "array", "minContains": 2}, "minContains"),
    ({"$dynamicRef": "#x"}, "$dynamicRef"),
    ({"type": "string", "format": "iri"}, "iri"),
    ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
    ({"type": "string", "pattern": "(a)\\1"}, "backreferences"),
    ({"type": "text"}, "text"),
    ({"$ref": "#/$defs/none"}, "none"),
    ({"$ref": "https://example.com/schema.json"}, "example.com"),
    ({"enum": []}, "Unsatisfiable"),
    ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
    ({"oneOf": [{"type": "string"}, {"minLength": 2}]}, "oneOf"),
    ({"x-guidance": {"lenient": True}, "not": {}}, "not"),
    (False, "false"),
]


@pytest.mark.parametrize(("schema", "word"), REFUSED)
def test_what_cannot_be_enforced_is_named(tokenizer: LLTokenizer, schema: Any, word: str) -> None:
    with pytest.raises(GrammarError, match=word.replace("$", r"\$")):
        matcher_of(tokenizer, schema)


def test_white_space_between_parts_is_bounded(tokenizer: LLTokenizer) -> None:
    matcher = matcher_of(tokenizer, {"type": "array", "items": {"const": 1}})
    for count, taken in ((0, True), (32, True), (33, False)):
        copy = matcher.deep_copy()
        assert copy.consume_tokens(list(b"[" + b" " * count + b"1]")) == taken
    compact = {"const": [1, 2], "x-guidance": {"whitespace_flexible": False}}
    assert not accepts(matcher_of(tokenizer, compact), [1, 2])
    assert accepts(matcher_of(tokenizer, compact), [1, 2], separators=(",", ":"))
