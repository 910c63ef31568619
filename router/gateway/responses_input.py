"""Input items of the Responses API, as messages for a chat template."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from headgate.router.errors import ValidationError
from headgate.router.gateway.chat_messages import call_for_template, part_text

_TEXT_PARTS = ("input_text", "output_text", "text")
_ROLES = ("user", "assistant", "system", "developer")


def messages_of(value: Any, instructions: str | None) -> list[dict[str, Any]]:
    """The conversation. Raises ValidationError naming the item at fault."""
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    if isinstance(value, str):
        return [*messages, {"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise ValidationError("`input` must be a string or a list of items", field="input")
    for index, item in enumerate(value):
        where = f"input[{index}]"
        if not isinstance(item, dict):
            raise ValidationError(f"`{where}` must be an object", field=where)
        kind = item.get("type") or "message"
        if not isinstance(kind, str) or kind not in _ITEMS:
            raise ValidationError(
                f"`{where}`: items of type `{str(kind)[:64]}` are not supported", field=where
            )
        _ITEMS[kind](messages, item, where)
    for message in messages:
        message.setdefault("content", "")
    return messages


def _message(messages: list[dict[str, Any]], item: dict[str, Any], where: str) -> None:
    role, text = item.get("role"), _text(item.get("content"), f"{where}.content")
    if role not in _ROLES:
        raise ValidationError(
            f"`{where}.role` must be one of {', '.join(_ROLES)}", field=f"{where}.role"
        )
    last = messages[-1] if messages else {}
    if role == "assistant" and "content" not in last and "reasoning_content" in last:
        last["content"] = text  # it goes on from its reasoning
    elif len(messages) == 1 and last["role"] == "system" and role in ("system", "developer"):
        last["content"] += f"\n\n{text}"  # templates take one system message
    else:
        messages.append({"role": role, "content": text})


def _call(messages: list[dict[str, Any]], item: dict[str, Any], where: str) -> None:
    name, id_ = item.get("name"), item.get("call_id")
    for key, given in (("name", name), ("call_id", id_)):
        if not isinstance(given, str) or not given:
            raise ValidationError(f"missing field `{where}.{key}`", field=f"{where}.{key}")
    call = call_for_template(id_, str(name), item.get("arguments"))
    _turn(messages).setdefault("tool_calls", []).append(call)


def _call_output(messages: list[dict[str, Any]], item: dict[str, Any], where: str) -> None:
    message = {"role": "tool", "content": _text(item.get("output"), f"{where}.output")}
    if isinstance(item.get("call_id"), str):
        message["tool_call_id"] = item["call_id"]
    messages.append(message)


def _reasoning(messages: list[dict[str, Any]], item: dict[str, Any], where: str) -> None:
    """The text of an earlier answer's reasoning; without one (it may be encrypted) nothing."""
    parts = item.get("content") or item.get("summary") or []
    text = _text(parts, f"{where}.content", ("reasoning_text", "summary_text"))
    if text:
        messages.append({"role": "assistant", "reasoning_content": text})


_ITEMS: dict[str, Callable[[list[dict[str, Any]], dict[str, Any], str], None]] = {
    "message": _message,
    "function_call": _call,
    "function_call_output": _call_output,
    "reasoning": _reasoning,
}


def _turn(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The assistant's turn that is being told: text, reasoning and calls are one message."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant"})
    return messages[-1]


def _text(content: Any, where: str, kinds: tuple[str, ...] = _TEXT_PARTS) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise ValidationError(f"`{where}` must be a string or a list of parts", field=where)
    return "".join(
        part_text(part, f"{where}[{index}]", kinds) for index, part in enumerate(content)
    )
