"""One tool call as JSON, read a character at a time: `{"name": ..., "arguments": {...}}`.

The arguments are given out while they are being written, as soon as the name is known to be a
tool's; whether they are JSON shows at their end.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from enum import Enum, auto
from typing import Any, NoReturn, Protocol

SPACE = " \t\r\n"
_ARGUMENTS = ("arguments", "parameters")
_BEFORE_NAME = ("type", "id")  # other keys may come before the name


class NotACallError(ValueError):
    """What was begun is not a call; the character that showed it has not been taken."""


class CallReader(Protocol):
    """Reads one call. Feed it until `complete`, or until it raises NotACallError."""

    name: str  # "" until it is known
    complete: bool
    arguments_complete: bool  # the call lacks at most its closing marks

    def push(self, char: str) -> str:
        """Takes a character; returns what can be given out of the arguments, mostly nothing."""


class ValueScanner:
    """Finds the end of a JSON object, array or string that begins with its first character."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def push(self, char: str) -> bool:
        """True with the last character of the value."""
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._in_string = False
                return self._depth == 0
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            return self._depth == 0
        return False


class _State(Enum):
    OPEN = auto()  # before {
    FIRST_KEY = auto()  # after {: a key or }
    NEXT_KEY = auto()  # after a comma
    KEY = auto()  # within a key
    COLON = auto()
    VALUE = auto()  # before a value
    NESTED = auto()  # within an object, array or string
    SCALAR = auto()  # within a number or a word
    AFTER = auto()  # after a value: a comma or }
    END = auto()


class CallObject:
    """A CallReader for an object with the tool's name and its arguments, in either order."""

    def __init__(self, names: Collection[str]) -> None:
        """`names`: of the tools that may be called."""
        self.name = ""
        self.complete = False
        self.arguments_complete = False
        self._names = names
        self._state = _State.OPEN
        self._scanner = ValueScanner()
        self._key = ""
        self._text: list[str] = []  # of the key or value that is being read
        self._held = ""  # arguments that came before the name
        self._has_arguments = False

    def push(self, char: str) -> str:
        state = self._state
        if state is _State.NESTED:
            return self._nested(char)
        if state is _State.KEY:
            self._in_key(char)
            return ""
        if state is _State.SCALAR:
            return self._scalar(char)
        if char not in SPACE:
            return self._between(char)
        return ""

    def _between(self, char: str) -> str:
        state = self._state
        if state is _State.OPEN and char == "{":
            self._state = _State.FIRST_KEY
        elif state in (_State.FIRST_KEY, _State.NEXT_KEY) and char == '"':
            self._begin(_State.KEY, char)
        elif state is _State.COLON and char == ":":
            self._state = _State.VALUE
        elif state is _State.AFTER and char == ",":
            self._state = _State.NEXT_KEY
        elif state is _State.AFTER and char == "}":
            return self._close()
        elif state is _State.VALUE and char in '{["':
            self._begin(_State.NESTED, char)
            return char if self._gives_out else ""
        elif state is _State.VALUE and (char.isalnum() or char == "-"):
            self._begin(_State.SCALAR, char)
        else:
            raise NotACallError
        return ""

    def _begin(self, state: _State, char: str) -> None:
        self._state = state
        self._text = [char]
        self._scanner = ValueScanner()
        self._scanner.push(char)

    @property
    def _gives_out(self) -> bool:
        """Whether the value that is being read goes out as it comes."""
        return bool(self.name) and self._key in _ARGUMENTS and self._text[0] == "{"

    def _in_key(self, char: str) -> None:
        self._text.append(char)
        if not self._scanner.push(char):
            return
        self._key = load_json("".join(self._text))
        known = self._key in _ARGUMENTS or self._key == "name"
        if not (known or self.name or self._key in _BEFORE_NAME):
            raise NotACallError
        self._state = _State.COLON

    def _nested(self, char: str) -> str:
        self._text.append(char)
        gives_out = self._gives_out
        if not self._scanner.push(char):
            return char if gives_out else ""
        self._state = _State.AFTER
        rest = self._end_value()
        return char if gives_out else rest

    def _scalar(self, char: str) -> str:
        if char not in ",}" and char not in SPACE:
            self._text.append(char)
            return ""
        self._state = _State.AFTER
        return self._end_value() + self.push(char)

    def _end_value(self) -> str:
        """Takes a whole value; returns arguments that had to wait for it."""
        value = load_json("".join(self._text))
        if self._key == "name":
            if self.name or not isinstance(value, str) or value not in self._names:
                raise NotACallError
            self.name = value
            held, self._held = self._held, ""
            return held
        if self._key not in _ARGUMENTS:
            return ""
        text = self._arguments(value)
        if self.name:
            return text
        self._held = text
        return ""

    def _arguments(self, value: Any) -> str:
        """The arguments' JSON text: an object, or a string that holds one."""
        if self._has_arguments:
            raise NotACallError
        self._has_arguments = self.arguments_complete = True
        text = "".join(self._text)
        if isinstance(value, str):
            text, value = encodable(value), load_json(value)
        if value is None:
            return "{}"
        if not isinstance(value, dict):
            raise NotACallError
        return text

    def _close(self) -> str:
        if not self.name:
            raise NotACallError
        self._state = _State.END
        self.complete = self.arguments_complete = True
        return "" if self._has_arguments else "{}"


def load_json(text: str) -> Any:
    """Raises NotACallError for what is not JSON."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise NotACallError from None


def encodable(text: str) -> str:
    """The text. Raises NotACallError for half a surrogate pair in it, which UTF-8 cannot say."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise NotACallError from None
    return text


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
