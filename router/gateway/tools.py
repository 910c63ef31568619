"""Tools as requests bring them: checked, and the same for every API.

Which calls a model made is the parsers' to say (parsers/).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from headgate.router.errors import ValidationError

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call."""

    name: str
    description: str | None
    parameters: dict[str, Any]  # a JSON schema
    strict: bool

    def for_template(self) -> dict[str, Any]:
        """As chat templates know tools."""
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        function["parameters"] = self.parameters
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What tools a request shows its model, and which calls it wants of it."""

    tools: tuple[Tool, ...] = ()
    callable_names: frozenset[str] = frozenset()  # all of them, or what `tool_choice` leaves
    required: bool = False  # the answer must be a call
    parallel: bool = True  # it may be several; one where a function is named


class ToolFields(Protocol):
    """The fields of a body that are about tools."""

    tools: list[Any] | None
    tool_choice: Any
    parallel_tool_calls: bool | None


def tools_of(body: ToolFields, *, nested: bool) -> ToolUse:
    """A body's tools. Raises ValidationError.

    `nested`: a tool's function is an object of its own, as in chats, not in responses.
    """
    tools = []
    for index, value in enumerate(body.tools or ()):
        where = f"tools[{index}]"
        kind = value.get("type") if isinstance(value, dict) else None
        if kind != "function":
            raise ValidationError(
                f"`{where}`: tools of type `{str(kind)[:64]}` are not supported", field=where
            )
        if nested:
            tools.append(function_of(value.get("function"), f"{where}.function"))
        else:
            tools.append(function_of(value, where))
    return tool_use(tools, body.tool_choice, parallel=body.parallel_tool_calls is not False)


def function_of(value: Any, where: str) -> Tool:
    """A tool from its function object. Raises ValidationError naming the part at fault."""
    if not isinstance(value, dict):
        raise ValidationError(f"`{where}` must be an object", field=where)
    name = value.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValidationError(
            f"`{where}.name` must be 1 to 64 letters, digits, dots, dashes or underscores",
            field=f"{where}.name",
        )
    description = value.get("description")
    if description is not None and not isinstance(description, str):
        raise ValidationError(
            f"`{where}.description` must be a string", field=f"{where}.description"
        )
    parameters = value.get("parameters")
    if parameters is None:
        parameters = value.get("arguments")  # TGI's other name for it
    if parameters is None:
        parameters = _NO_PARAMETERS
    if not isinstance(parameters, dict):
        raise ValidationError(
            f"`{where}.parameters` must be an object", field=f"{where}.parameters"
        )
    return Tool(name, description, parameters, bool(value.get("strict")))


def tool_use(tools: Iterable[Tool], choice: Any, *, parallel: bool) -> ToolUse:
    """What `tool_choice` makes of the tools. Raises ValidationError.

    `choice`: None, "auto", "none", "required", a function's name, or one of OpenAI's objects.
    """
    tools = tuple(tools)
    names = [tool.name for tool in tools]
    for name in names:
        if names.count(name) > 1:
            raise ValidationError(f"`tools` holds two functions named `{name}`", field="tools")
    if choice == "none" or (not tools and choice in (None, "auto")):
        return ToolUse()
    if not tools:
        raise ValidationError("`tool_choice` needs `tools`", field="tool_choice")
    chosen, required = _chosen(choice, names)
    for name in chosen:
        if name not in names:
            raise ValidationError(
                f"`tool_choice` names `{name[:64]}`, which is not in `tools`", field="tool_choice"
            )
    named = required and choice != "required" and len(chosen) == 1
    return ToolUse(tools, frozenset(chosen), required, parallel and not named)


def _chosen(choice: Any, names: list[str]) -> tuple[list[str], bool]:
    """The functions that may be called, and whether one must be."""
    if choice in (None, "auto", "required"):
        return names, choice == "required"
    if isinstance(choice, str):
        return [choice], True  # TGI's way to name a function
    kind = choice.get("type") if isinstance(choice, dict) else None
    if kind == "function":
        return [_name_in(choice)], True
    if kind == "allowed_tools":
        allowed = choice.get("allowed_tools", choice)  # nested in chats, not in responses
        entries = allowed.get("tools") if isinstance(allowed, dict) else None
        mode = allowed.get("mode", "auto") if isinstance(allowed, dict) else None
        if isinstance(entries, list) and entries and mode in ("auto", "required"):
            return [_name_in(entry) for entry in entries], mode == "required"
    raise ValidationError(
        "`tool_choice` must be auto, none, required, or name a function or allowed tools",
        field="tool_choice",
    )


def _name_in(value: Any) -> str:
    """The name in {"type": "function", "name"} or {"type": "function", "function": {"name"}}."""
    if isinstance(value, dict):
        inner = value.get("function", value)
        name = inner.get("name") if isinstance(inner, dict) else None
        if value.get("type") == "function" and isinstance(name, str):
            return name
    raise ValidationError("`tool_choice` must name a function", field="tool_choice")
