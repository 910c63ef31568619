"""What an answer must be, in vLLM's words: StructuredOutputsParams, once GuidedDecodingParams."""

from __future__ import annotations

import json as json_module
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from headgate.router.grammar import Grammar, StructuralTag, StructuralTags

_KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")


@dataclass(frozen=True, slots=True)
class StructuredOutputsParams:
    """Exactly one of the first six. Raises ValueError for more, none, or a wrong type."""

    json: str | dict[str, Any] | Any = None  # a JSON Schema, as text, object or pydantic model
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None  # Lark or GBNF
    json_object: bool | None = None
    structural_tag: str | dict[str, Any] | None = None  # {"structures": [...], "triggers": [...]}
    backend: str | None = None  # vLLM's choice of a library; there is one here
    whitespace_pattern: str | None = None
    disable_fallback: bool = False  # there is nothing to fall back to
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False

    def __post_init__(self) -> None:
        self.to_grammar()

    @classmethod
    def of(cls, value: Any) -> StructuredOutputsParams:
        """From an instance, or an object with its fields. Raises ValueError."""
        if isinstance(value, cls):
            return value
        if not isinstance(value, dict):
            raise ValueError(f"must be an object, not {type(value).__name__}")
        names = {field.name for field in fields(cls)}
        unknown = [name for name in value if name not in names and value[name] is not None]
        if unknown:
            raise ValueError(f"has no field `{str(unknown[0])[:64]}`")
        return cls(**{name: value[name] for name in value if value[name] is not None})

    def to_grammar(self) -> Grammar:
        """What the router takes. Raises ValueError."""
        for name in (
            "whitespace_pattern",
            "disable_any_whitespace",
            "disable_additional_properties",
        ):
            if getattr(self, name):
                raise ValueError(f"`{name}` is not supported")
        given = [name for name in _KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise ValueError(
                f"exactly one of {', '.join(_KINDS)} must be given"
                + (f", not {' and '.join(given)}" if given else "")
            )
        name = given[0]
        return _READERS[name](getattr(self, name))


class GuidedDecodingParams(StructuredOutputsParams):
    """The same under the name that it had before."""


def json_schema(value: Any) -> Grammar:
    """The grammar of a JSON Schema, given as JSON text, as an object or as a pydantic model."""
    if hasattr(value, "model_json_schema"):
        value = value.model_json_schema()
    if isinstance(value, str):
        return Grammar("json_schema", value)
    if not isinstance(value, dict | bool):
        raise ValueError(f"a JSON Schema is an object or JSON text, not {type(value).__name__}")
    try:
        return Grammar("json_schema", json_module.dumps(value, ensure_ascii=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the schema is not JSON: {error}") from error


def regex(value: Any) -> Grammar:
    """The grammar of a regular expression."""
    return Grammar("regex", _text(value))


def lark(value: Any) -> Grammar:
    """A context-free grammar, in Lark or GBNF."""
    return Grammar("lark", _text(value))


def choice(value: Any) -> Grammar:
    """One of some texts."""
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise ValueError("choices are a list of texts that is not empty")
    return Grammar("choice", tuple(map(_text, value)))


def structural_tag(value: Any) -> Grammar:
    """Tags in free text: {"structures": [{"begin", "schema", "end"}], "triggers": [...]}."""
    if isinstance(value, str):
        try:
            value = json_module.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the structural tag is not JSON: {error}") from error
    if not isinstance(value, dict) or not isinstance(value.get("structures"), list):
        raise ValueError("a structural tag has a list `structures`, and a list `triggers`")
    tags = []
    for entry in value["structures"]:
        if not isinstance(entry, dict):
            raise ValueError("each of `structures` is an object with begin, schema and end")
        schema = json_schema(entry.get("schema")).value
        assert isinstance(schema, str)
        tags.append(StructuralTag(_text(entry.get("begin")), schema, _text(entry.get("end", ""))))
    triggers = value.get("triggers")
    if not isinstance(triggers, list) or not triggers:
        raise ValueError("`triggers` is a list of texts that is not empty")
    return Grammar("structural_tags", StructuralTags(tuple(tags), tuple(map(_text, triggers))))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"a text is expected, not {type(value).__name__}")
    return value


_READERS = {
    "json": json_schema,
    "regex": regex,
    "choice": choice,
    "grammar": lark,
    "json_object": lambda value: Grammar("json_object", True),
    "structural_tag": structural_tag,
}
