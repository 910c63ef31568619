"""Tool calls of Mistral models: `[TOOL_CALLS]` and a list of calls, or names with arguments.

Up to tokenizer v7 a list of `{"name": ..., "arguments": {...}}` follows the mark; from v11 on each
call has a mark of its own: `[TOOL_CALLS]name[CALL_ID]id[ARGS]{...}`, the id or `[ARGS]` left out by
some versions.
"""

from __future__ import annotations

from collections.abc import Collection

from headgate.router.gateway.parsers.json_call import (
    SPACE,
    CallReader,
    NotACallError,
    ValueScanner,
    load_json,
)
from headgate.router.gateway.parsers.tool_parser import CallFormat, ToolParser, random_name

_ARGUMENTS_MARK = "[ARGS]"
_ID_MARK = "[CALL_ID]"


class MistralParser(ToolParser):
    """The templates of these models take ids of nine letters and digits only."""

    mark = "[TOOL_CALLS]"
    mark_is_special = True
    trigger = mark
    written = CallFormat('[TOOL_CALLS] [{"name": ', ', "arguments": ', "}]", "")

    def new_id(self) -> str:
        return random_name(9)

    def reader(self, char: str) -> CallReader | None:
        if char.isalnum() or char in "_-":
            return _NamedCall(self._names)
        return super().reader(char)


class _NamedCall:
    """A CallReader for a name, marks, and an object of arguments."""

    def __init__(self, names: Collection[str]) -> None:
        self.name = ""
        self.complete = False
        self.arguments_complete = False
        self._names = names
        self._head = ""
        self._arguments = ""
        self._scanner = ValueScanner()

    def push(self, char: str) -> str:
        if not self._arguments and char != "{":
            self._head += char
            if len(self._head) > 512:
                raise NotACallError
            return ""
        if not self._arguments:
            self.name = self._name_of(self._head)
        self._arguments += char
        if self._scanner.push(char):
            load_json(self._arguments)
            self.complete = self.arguments_complete = True
        return char

    def _name_of(self, head: str) -> str:
        name = head.strip(SPACE).removesuffix(_ARGUMENTS_MARK).partition(_ID_MARK)[0]
        if name not in self._names:
            raise NotACallError
        return name
