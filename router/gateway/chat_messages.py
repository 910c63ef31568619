"""Chat messages as bodies bring them, flattened for templates: text, tool calls, tool results."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from typing import Any

from headgate.router.errors import ValidationError
from headgate.router.gateway.openai_schemas import ChatMessage

_UNSERVED = ("function_call", "audio")


def flatten(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages for a template. Raises ValidationError naming the part at fault."""
    if not messages:
        raise ValidationError("`messages` cannot be empty", field="messages")
    return [_flat(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _flat(message: ChatMessage, where: str) -> dict[str, Any]:
    """Its text parts joined, and of the rest what templates read."""
    for name in _UNSERVED:
        if getattr(message, name):
            raise ValidationError(f"`{where}.{name}` is not supported", field=f"{where}.{name}")
    if message.content is None and not message.tool_calls:
        raise ValidationError(f"missing field `{where}.content`", field=f"{where}.content")
    flat: dict[str, Any] = {"role": message.role, "content": _text(message.content, where)}
    for name in ("name", "tool_call_id", "reasoning_content"):
        if value := getattr(message, name):
            flat[name] = value
    if message.tool_calls:
        flat["tool_calls"] = [
            _call(call, f"{where}.tool_calls[{at}]") for at, call in enumerate(message.tool_calls)
        ]
    return flat


def _text(content: str | list[dict[str, Any]] | None, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "".join(part_text(part, f"{where}.content[{at}]") for at, part in enumerate(content))


def part_text(part: dict[str, Any], where: str, kinds: Sequence[str] = ("text",)) -> str:
    """The text of a content part of one of these types."""
    kind = part.get("type")
    if kind not in kinds:
        raise ValidationError(
            f"`{where}`: parts of type `{str(kind)[:64]}` are not supported", field=where
        )
    text = part.get("text")
    if not isinstance(text, str):
        raise ValidationError(f"missing field `{where}.text`", field=f"{where}.text")
    return text


def _call(value: Any, where: str) -> dict[str, Any]:
    """A call of an earlier answer."""
    function = value.get("function") if isinstance(value, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str):
        raise ValidationError(f"missing field `{where}.function.name`", field=f"{where}.function")
    arguments = function.get("arguments")
    if arguments is None:
        arguments = function.get("parameters")  # TGI's other name for them
    return call_for_template(value.get("id"), name, arguments)


def call_for_template(id_: Any, name: str, arguments: Any) -> dict[str, Any]:
    """As templates know calls: with an object of arguments, not its JSON text."""
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError):  # then it is shown to the model as it once wrote it
            arguments = json.loads(arguments)
    function = {"name": name, "arguments": {} if arguments in (None, "") else arguments}
    call: dict[str, Any] = {"type": "function", "function": function}
    return {"id": id_, **call} if isinstance(id_, str) else call
