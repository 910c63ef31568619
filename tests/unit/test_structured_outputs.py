"""vLLM's names for what an answer must be, in Python."""

from __future__ import annotations

import json
from typing import Any

import pytest

from headgate import GuidedDecodingParams, SamplingParams, StructuredOutputsParams
from headgate.router.grammar import Grammar, StructuralTag, StructuralTags

SCHEMA = {"type": "object", "properties": {"é": {"enum": [None, 1]}}}


class Model:
    """As pydantic's models are."""

    @classmethod
    def model_json_schema(cls) -> dict[str, Any]:
        return SCHEMA


TAGS = {
    "structures": [{"begin": "<f>", "schema": {"type": "integer"}, "end": "</f>"}],
    "triggers": ["<f"],
}


@pytest.mark.parametrize(
    ("fields", "kind", "value"),
    [
        ({"json": SCHEMA}, "json_schema", json.dumps(SCHEMA, ensure_ascii=False)),
        ({"json": Model}, "json_schema", json.dumps(SCHEMA, ensure_ascii=False)),
        ({"json": '{"type": "null"}'}, "json_schema", '{"type": "null"}'),
        ({"regex": "a|b"}, "regex", "a|b"),
        ({"choice": ["a", "b"]}, "choice", ("a", "b")),
        ({"grammar": "root ::= [0-9]"}, "lark", "root ::= [0-9]"),
        ({"json_object": True}, "json_object", True),
        ({"json_object": False, "regex": "a"}, "regex", "a"),
        (
            {"structural_tag": TAGS},
            "structural_tags",
            StructuralTags((StructuralTag("<f>", '{"type": "integer"}', "</f>"),), ("<f",)),
        ),
    ],
)
def test_what_reaches_the_router(fields: dict[str, Any], kind: str, value: Any) -> None:
    grammar = Grammar(kind, value)
    for params in (
        SamplingParams(structured_outputs=StructuredOutputsParams(**fields)),
        SamplingParams(structured_outputs=fields),
        SamplingParams(guided_decoding=GuidedDecodingParams(**fields)),
    ):
        assert params.to_router().grammar == grammar
        assert params.to_router().to_proto().grammar == grammar.to_proto()
    assert SamplingParams().to_router().grammar is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "exactly one of"),
        ({"json": "{}", "regex": "a"}, "not json and regex"),
        ({"json": 5}, "object or JSON text"),
        ({"json": {"a": {1}}}, "not JSON"),
        ({"regex": 5}, "a text is expected"),
        ({"choice": "ab"}, "a list of texts"),
        ({"choice": []}, "a list of texts"),
        ({"structural_tag": {"structures": []}}, "triggers"),
        ({"structural_tag": {"format": {}}}, "structures"),
        ({"structural_tag": "{"}, "not JSON"),
        ({"regex": "a", "whitespace_pattern": " "}, "whitespace_pattern"),
        ({"regex": "a", "disable_any_whitespace": True}, "disable_any_whitespace"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        StructuredOutputsParams(**fields)
    with pytest.raises(ValueError, match=f"`structured_outputs`.*{words}"):
        SamplingParams(structured_outputs=fields)


def test_one_name_at_a_time() -> None:
    params = StructuredOutputsParams(regex="a")
    with pytest.raises(ValueError, match="`guided_decoding`"):
        SamplingParams(structured_outputs=params, guided_decoding=params)
