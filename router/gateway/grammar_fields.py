"""The fields of all APIs that say what an answer must be, as one router's Grammar.

TGI's `grammar`, OpenAI's `response_format`, vLLM's `structured_outputs` and its older `guided_*`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from headgate.proto import router_pb2
from headgate.router.errors import ValidationError
from headgate.router.grammar import Grammar
from headgate.structured_outputs import (
    StructuredOutputsParams,
    choice,
    json_schema,
    lark,
    regex,
    structural_tag,
)

if TYPE_CHECKING:
    from headgate.router.gateway.openai_schemas import CommonFields

_JSON_OBJECT = Grammar("json_object", True)


def tgi_grammar(value: Any, field: str = "grammar") -> router_pb2.Grammar | None:
    """`{"type": "json" | "json_object" | "json_schema" | "regex", "value": ...}`; null is none.

    Raises ValidationError.
    """
    if not value:
        return None
    return _read(field, _tgi, value)


def grammar_of(body: CommonFields) -> router_pb2.Grammar | None:
    """What the one field says that asks for a grammar. Raises ValidationError."""
    given = _given(body)
    if len(given) > 1:
        raise ValidationError(
            f"`{given[0]}` and `{given[1]}` cannot be given together: an answer has one grammar",
            field=given[1],
        )
    if not given:
        return None
    return _read(given[0], _READERS[given[0]], getattr(body, given[0]))


def text_grammar(form: dict[str, Any] | None) -> router_pb2.Grammar | None:
    """What `text.format` of the Responses API says. Raises ValidationError."""
    if not form or form.get("type") == "text":
        return None
    return _read("text.format", _text_format, form)


def _text_format(form: dict[str, Any]) -> Grammar:
    if form.get("type") == "json_object":
        return _JSON_OBJECT
    if form.get("type") != "json_schema":
        raise ValueError("`type` must be text, json_object or json_schema")
    if form.get("schema") is None:
        raise ValueError("missing field `schema`")
    return json_schema(form["schema"])


def with_grammar_field(names: Mapping[str, str], body: CommonFields) -> Mapping[str, str]:
    """A route's names of the router's fields, with that of the one that brings the grammar."""
    given = _given(body)
    return {**names, "grammar": given[0]} if given else names


def _given(body: CommonFields) -> list[str]:
    """The fields that ask for a grammar."""
    given = [name for name in _READERS if getattr(body, name) not in (None, {}, [], "", False)]
    if body.response_format and body.response_format.get("type") == "text":
        given.remove("response_format")
    return given


def _read(name: str, read: Callable[[Any], Grammar], value: Any) -> router_pb2.Grammar:
    try:
        return read(value).to_proto()  # a ValueError too, for half a surrogate pair
    except ValueError as error:
        raise ValidationError(f"`{name}`: {error}", field=name) from error


def _tgi(value: Any) -> Grammar:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in ("json", "json_object", "json_schema", "regex"):
        raise ValueError("`type` must be json, json_object, json_schema or regex")
    content = value.get("value")
    if kind == "regex":
        return regex(content)
    if kind == "json_schema":
        if not isinstance(content, dict) or "schema" not in content:
            raise ValueError("the `value` of a json_schema is an object with `schema`")
        content = content["schema"]
    if not isinstance(content, dict | str):
        raise ValueError("grammar is not supported: a schema is an object or JSON text")
    if isinstance(content, str):
        content = _parsed(content)
    return json_schema(content)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"grammar is not valid: {error}") from error


def _response_format(value: Any) -> Grammar:
    """OpenAI's shapes, vLLM's structural_tag, and TGI's, which have a `value`."""
    kind = value.get("type")
    if "value" in value:
        return _tgi(value)
    if kind == "json_object":
        return _JSON_OBJECT
    if kind == "structural_tag":
        return structural_tag(value)
    if kind != "json_schema":
        raise ValueError("`type` must be text, json_object, json_schema or structural_tag")
    wrapper = value.get("json_schema")
    if not isinstance(wrapper, dict) or wrapper.get("schema") is None:
        raise ValueError("missing field `json_schema.schema`")
    return json_schema(wrapper["schema"])


_READERS: dict[str, Callable[[Any], Grammar]] = {
    "response_format": _response_format,
    "grammar": _tgi,
    "structured_outputs": lambda value: StructuredOutputsParams.of(value).to_grammar(),
    "guided_json": json_schema,
    "guided_regex": regex,
    "guided_choice": choice,
    "guided_grammar": lark,
    "guided_json_object": lambda value: _JSON_OBJECT,
}
