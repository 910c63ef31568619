"""The grammar of an answer that must be a tool call, or whose calls must be as their tools say."""

from __future__ import annotations

import json
from collections.abc import Iterable

from headgate.proto import router_pb2
from headgate.router.errors import ValidationError
from headgate.router.gateway.parsers.tool_parser import ToolParser
from headgate.router.gateway.tools import Tool, ToolUse

_Tags = router_pb2.Grammar.StructuralTags
_JSON_OBJECT = '{"type": "object"}'


def answer_grammar(
    use: ToolUse, parser: type[ToolParser], wanted: router_pb2.Grammar | None
) -> router_pb2.Grammar | None:
    """What the answer must be; None: anything. `wanted`: what it is to be if it is no call.

    Raises ValidationError where the two do not go together.
    """
    tools = [tool for tool in use.tools if tool.name in use.callable_names]
    if use.required:
        if wanted is not None:
            raise ValidationError(
                "`tool_choice` asks for a call, so there is no answer to give a form",
                field="tool_choice",
            )
        return _grammar(
            _tags(tools, parser),
            single=not use.parallel,
            separator=parser.written.separator if use.parallel else "",
        )
    if wanted is not None:
        return _call_or_answer(tools, parser, wanted) if tools else wanted
    if not any(tool.strict for tool in tools):
        return None
    tags = _tags(tools, parser, strict_only=True)
    return _grammar(tags, triggers=[parser.trigger], single=not use.parallel)


def _call_or_answer(
    tools: Iterable[Tool], parser: type[ToolParser], wanted: router_pb2.Grammar
) -> router_pb2.Grammar:
    """One call or one answer: the answer is a tag without texts around it."""
    kind = wanted.WhichOneof("kind")
    if kind not in ("json_schema", "json_object"):
        raise ValidationError("beside `tools` an answer can only be JSON", field="tools")
    schema = wanted.json_schema if kind == "json_schema" else _JSON_OBJECT
    tags = [*_tags(tools, parser), _Tags.Tag(json_schema=schema)]
    return _grammar(tags, single=True)


def _grammar(
    tags: list[_Tags.Tag], *, triggers: Iterable[str] = (), single: bool, separator: str = ""
) -> router_pb2.Grammar:
    tagged = _Tags(tags=tags, triggers=triggers, single=single, separator=separator)
    return router_pb2.Grammar(structural_tags=tagged)


def _tags(
    tools: Iterable[Tool], parser: type[ToolParser], strict_only: bool = False
) -> list[_Tags.Tag]:
    """A tag for each tool's call. `strict_only`: any object will do for a tool that is not."""
    form = parser.written
    return [
        _Tags.Tag(
            begin=f"{form.before}{json.dumps(tool.name)}{form.between}",
            json_schema=_JSON_OBJECT if strict_only and not tool.strict else _schema(tool),
            end=form.behind,
        )
        for tool in tools
    ]


def _schema(tool: Tool) -> str:
    """Of the arguments, which are an object whether or not the tool says so."""
    return json.dumps({"type": "object", **tool.parameters}, ensure_ascii=False)
