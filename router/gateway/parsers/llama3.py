"""Tool calls of Llama 3 models: an answer that is `{"name": ..., "parameters": {...}}`.

The object begins the answer or follows `<|python_tag|>`; more of them follow after semicolons.
Llama 3.2 may write a list of Python calls instead, `[name(key="value"), ...]`, and the built-in
tools of Llama 3.1 are called as `<|python_tag|>name.call(key="value")`.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Collection
from typing import Any

from headgate.router.gateway.parsers.json_call import (
    SPACE,
    CallReader,
    NotACallError,
    encodable,
)
from headgate.router.gateway.parsers.tool_parser import CallFormat, ToolParser

_CALL = ".call"
_JSON_WORDS = {"null": None, "true": True, "false": False}  # for Python's own


class Llama3Parser(ToolParser):
    """An object that begins an answer but names no tool is content."""

    mark = "<|python_tag|>"
    mark_is_special = True
    trigger = '{"name": '
    written = CallFormat('{"name": ', ', "parameters": ', "}", "; ")

    def __init__(self, names: Collection[str], *, parallel: bool) -> None:
        super().__init__(names, parallel=parallel)
        self._state = self._at_start

    def reader(self, char: str) -> CallReader | None:
        if char.isidentifier():
            return _PythonCall(self._names)
        return super().reader(char)

    def _at_start(self, text: str) -> str:
        char = text[0]
        if char in SPACE:
            self._raw += char
            return text[1:]
        if char in "{[":
            self._state = self._opening
            return text
        before, self._raw = self._raw, ""
        self._state = self._in_text
        return before + text

    def _after_call(self, text: str) -> str:
        """More calls may follow, a comma before each in a list, else a semicolon."""
        if self._in_list:
            return super()._after_call(text)
        char = text[0]
        if char in SPACE:
            return text[1:]
        if char == ";":
            self._raw, text = char, text[1:]
        self._state = self._opening if char in ";{" else self._in_text
        return text


class _PythonCall:
    """A CallReader for `name(key=literal, ...)` or `name.call(...)`.

    Its arguments come out at its end.
    """

    def __init__(self, names: Collection[str]) -> None:
        self.name = ""
        self.complete = False
        self.arguments_complete = False
        self._names = names
        self._text = ""
        self._depth = 0
        self._quote = ""
        self._escaped = False

    def push(self, char: str) -> str:
        if not self._depth:
            return self._in_name(char)
        self._text += char
        if self._quote:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == self._quote:
                self._quote = ""
        elif char in "\"'":
            self._quote = char
        elif char in "([{":
            self._depth += 1
        elif char in ")]}":
            self._depth -= 1
            return self._end() if not self._depth else ""
        return ""

    def _in_name(self, char: str) -> str:
        if char == "(":
            if self._text not in self._names:
                self._text = self._text.removesuffix(_CALL)
            if self._text not in self._names:
                raise NotACallError
            self.name = self._text
            self._text = "f("
            self._depth = 1
        elif char.isalnum() or char in "_.-":
            self._text += char
        else:
            raise NotACallError
        return ""

    def _end(self) -> str:
        try:
            call = ast.parse(self._text, mode="eval").body
            assert isinstance(call, ast.Call)
            if call.args or any(keyword.arg is None for keyword in call.keywords):
                raise NotACallError
            values = {keyword.arg: _value(keyword.value) for keyword in call.keywords}
            text = encodable(json.dumps(values, ensure_ascii=False, allow_nan=False))
        except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError, AssertionError):
            raise NotACallError from None
        self.complete = self.arguments_complete = True
        return text


def _value(node: ast.expr) -> Any:
    """A literal's value. Raises ValueError for any other expression."""
    return ast.literal_eval(_JsonWords().visit(node))


class _JsonWords(ast.NodeTransformer):
    """Takes JSON's words for constants, which some models write."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(_JSON_WORDS[node.id]) if node.id in _JSON_WORDS else node
