"""From a client's grammar to llguidance's: JSON text that holds a schema or a Lark grammar."""

from __future__ import annotations

import json
from typing import Any

from llguidance import LLMatcher, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark

from headgate.grammar_engine import GrammarError
from headgate.router.grammar import Grammar, StructuralTag, StructuralTags

# Between JSON's tokens: nothing, a space, or a line break with indentation. Bounded, because a
# model that may repeat white space without end does.
_SCHEMA_DEFAULTS: Any = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,32}"}
_SCHEMA_OVERRIDES: Any = {"lenient": False}  # a keyword that is not enforced is an error
_FREE_TEXT = r"/(.|\n)*/"


def to_source(grammar: Grammar, tokenizer: LLTokenizer) -> str:
    """What llguidance takes. Raises GrammarError; says nothing yet on whether it compiles."""
    value = grammar.value
    if isinstance(value, StructuralTags):
        return LLMatcher.grammar_from_lark(_tags_to_lark(value, tokenizer))
    if isinstance(value, tuple):
        # One alternative per text, so that texts that begin alike share a path.
        return LLMatcher.grammar_from_lark("start: " + " | ".join(map(_quoted, value)))
    if grammar.kind == "json_object":
        return schema_source({"type": "object"})
    assert isinstance(value, str)
    if grammar.kind == "json_schema":
        return schema_source(parse_schema(value))
    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(value)
    return LLMatcher.grammar_from_lark(_to_lark(value))


def parse_schema(text: str) -> dict[str, Any]:
    """Raises GrammarError for what is no JSON, or no schema."""
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"the schema is not JSON: {error}") from error
    if isinstance(schema, bool):
        if not schema:
            raise GrammarError("the schema `false` allows nothing")
        return {}
    if not isinstance(schema, dict):
        raise GrammarError("a JSON Schema is an object")
    return schema


def schema_source(schema: dict[str, Any]) -> str:
    """The source for a JSON Schema, whose own word on white space goes before ours."""
    own = schema.get("x-guidance")
    spaced = isinstance(own, dict) and any(name.startswith("whitespace") for name in own)
    defaults: Any = {} if spaced else _SCHEMA_DEFAULTS
    try:
        return LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults, _SCHEMA_OVERRIDES)
    except (ValueError, RecursionError) as error:
        raise GrammarError(str(error)) from error


def _to_lark(text: str) -> str:
    try:
        return any_to_lark(text)
    except Exception as error:  # GBNF that it cannot read
        raise GrammarError(f"it is neither Lark nor GBNF: {error}") from error


def _quoted(text: str) -> str:
    """A text as a Lark literal."""
    return json.dumps(text, ensure_ascii=False)


def _tags_to_lark(value: StructuralTags, tokenizer: LLTokenizer) -> str:
    names = [f"tag_{index}" for index in range(len(value.tags))]
    rules = []
    for name, tag in zip(names, value.tags, strict=True):
        rules += _tag_rules(name, tag, value.triggers, tokenizer)
    any_tag = f"({' | '.join(names)})"
    if value.triggers:
        start = f"{any_tag} | free_text" if value.single else f"{any_tag}* free_text"
        rules.append("free_text: FREE_TEXT")
        rules.append(f"FREE_TEXT: {_FREE_TEXT}")
    elif value.single:
        start = any_tag
    else:
        separator = _literal(value.separator, tokenizer)
        start = f"{any_tag} ({separator} {any_tag})*"
    return "\n".join([f"start: {start}", *rules])


def _tag_rules(
    name: str, tag: StructuralTag, triggers: tuple[str, ...], tokenizer: LLTokenizer
) -> list[str]:
    """The rule of one tag, and where text leads up to it that of its trigger."""
    options = json.loads(schema_source(parse_schema(tag.json_schema)))
    schema = json.dumps(options["grammars"][0]["json_schema"])
    end = _literal(tag.end, tokenizer)
    trigger = next((trigger for trigger in triggers if tag.begin.startswith(trigger)), None)
    if trigger is None:
        return [f"{name}: {_literal(tag.begin, tokenizer)} %json {schema} {end}"]
    rest = _literal(tag.begin[len(trigger) :], tokenizer)
    if _is_special(trigger, tokenizer):  # text never is: no need to look out for it
        head = f"FREE_TEXT {_literal(trigger, tokenizer)}"
        return [f"{name}: {head} {rest} %json {schema} {end}"]
    return [
        f"{name}_head[lazy]: FREE_TEXT {_quoted(trigger)}",
        f"{name}: {name}_head {rest} %json {schema} {end}",
    ]


def _literal(text: str, tokenizer: LLTokenizer) -> str:
    """Text, with the special tokens that it names, in Lark."""
    parts: list[str] = []
    plain: list[int] = []

    def end_plain() -> None:
        if plain:
            parts.append(_quoted(tokenizer.decode_str(plain)))
            plain.clear()

    for token in tokenizer.tokenize_str(text, parse_special=True):
        if tokenizer.is_special_token(token):
            end_plain()
            parts.append(f"<[{token}]>")
        else:
            plain.append(token)
    end_plain()
    return " ".join(parts)


def _is_special(text: str, tokenizer: LLTokenizer) -> bool:
    tokens = tokenizer.tokenize_str(text, parse_special=True)
    return len(tokens) == 1 and tokenizer.is_special_token(tokens[0])
