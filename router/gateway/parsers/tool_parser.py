"""What the formats of tool calls have in common: a mark opens a call, a reader takes it.

Other text is content. White space before and between calls belongs to them and is dropped. What
begins like a call but is none comes out as content, unchanged.
"""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import ClassVar

from headgate.router.gateway.parsers.deltas import (
    CallArguments,
    CallBroken,
    CallEnd,
    CallStart,
    Content,
    Delta,
    merged,
)
from headgate.router.gateway.parsers.json_call import SPACE, CallObject, CallReader, NotACallError

_ALPHANUMERIC = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True)
class CallFormat:
    """How a model writes a call: these texts before, between and behind name and arguments."""

    before: str
    between: str
    behind: str
    separator: str  # between two calls

    def write(self, name: str, arguments: str) -> str:
        """`arguments`: JSON text."""
        return f"{self.before}{json.dumps(name)}{self.between}{arguments}{self.behind}"


class MarkFinder:
    """Splits text at a mark, holding back what may be its beginning and the space before it."""

    def __init__(self, mark: str) -> None:
        self._mark = mark
        self._held = ""

    def push(self, text: str) -> tuple[str, str, str | None]:
        """Text that is no part of the mark, space before the mark, and what follows the mark.

        The last is None while no mark has come.
        """
        text = self._held + text
        self._held = ""
        before, mark, after = text.partition(self._mark)
        if mark:
            shown = before.rstrip(SPACE)
            return shown, before[len(shown) :], after
        begun = next(
            (n for n in range(len(self._mark) - 1, 0, -1) if text.endswith(self._mark[:n])), 0
        )
        shown = text[: len(text) - begun].rstrip(SPACE)
        self._held = text[len(shown) :]
        return shown, "", None

    def flush(self) -> str:
        """What was held back, since nothing follows."""
        held, self._held = self._held, ""
        return held


class ToolParser:
    """A Parser for the calls of one format. A subclass says what opens and closes them."""

    mark: ClassVar[str]  # opens a call, or a list of them
    close: ClassVar[str] = ""  # follows it, or ""
    mark_is_special: ClassVar[bool] = False  # a special token, which texts leave out by default
    written: ClassVar[CallFormat]
    trigger: ClassVar[str]  # how `written` begins: text that goes on as a call wherever it comes

    def __init__(self, names: Collection[str], *, parallel: bool) -> None:
        """`names`: of the tools that may be called. `parallel`: more than one call is wanted."""
        self._names = names
        self._parallel = parallel
        self._deltas: list[Delta] = []
        self._finder = MarkFinder(self.mark)
        self._state: Callable[[str], str] = self._in_text
        self._call: CallReader | None = None
        self._raw = ""  # the call's text so far, its mark and the space before it included
        self._index = -1  # of the last call
        self._started = False  # whether the call that is being read has been told
        self._in_list = False
        self._closing = ""  # how much of `close` has come

    def new_id(self) -> str:
        """An id for a call, in OpenAI's style."""
        return "call_" + random_name(24)

    def feed(self, text: str) -> list[Delta]:
        self._deltas = []
        while text:
            text = self._state(text)
        return merged(self._deltas)

    def finish(self, truncated: bool) -> list[Delta]:
        self._deltas = []
        held = self._finder.flush()
        if self._index < 0 or held.strip(SPACE):
            self._show(held)
        if self._call is None or not self._started:
            self._show(self._raw)
        elif self._call.arguments_complete:
            self._deltas.append(CallEnd(self._index))
        elif not truncated:
            self._deltas.append(CallBroken(self._index, self._raw))
        if not truncated:
            self._show(self._closing)
        return merged(self._deltas)

    def reader(self, char: str) -> CallReader | None:
        """What reads a call that begins with this character; None: none does."""
        return CallObject(self._names) if char == "{" else None

    # Each state takes a text that is not empty and returns the rest of it.

    def _in_text(self, text: str) -> str:
        shown, space, after = self._finder.push(text)
        self._show(shown)
        if after is None:
            return ""
        self._raw = space + self.mark
        self._in_list = False
        self._state = self._opening
        return after

    def _opening(self, text: str) -> str:
        """Before a call's first character."""
        char = text[0]
        if char in SPACE or (char == "[" and not self._in_list):
            self._in_list = self._in_list or char == "["
            self._raw += char
            return text[1:]
        self._call = self.reader(char)
        if self._call is None:
            return self._give_up(text)
        self._started = False
        self._state = self._in_call
        return text

    def _in_call(self, text: str) -> str:
        call = self._call
        assert call is not None
        for place, char in enumerate(text):
            try:
                piece = call.push(char)
            except NotACallError:
                return self._give_up(text[place:])
            self._raw += char
            if piece:
                self._start(call.name)
                self._deltas.append(CallArguments(self._index, piece))
            if call.complete:
                self._deltas.append(CallEnd(self._index))
                self._call, self._raw = None, ""
                self._state = self._after_call if self._parallel else self._drop
                return text[place + 1 :]
        return ""

    def _after_call(self, text: str) -> str:
        """Between a call and what separates it from the next, or closes it."""
        char = text[0]
        if char in SPACE:
            return text[1:]
        if self._in_list and char == ",":
            self._state = self._opening
            return text[1:]
        if self._in_list and char == "]":
            self._in_list = False
            return text[1:]
        self._state = self._at_close if self.close else self._in_text
        return text

    def _at_close(self, text: str) -> str:
        for place, char in enumerate(text):
            if not self.close.startswith(self._closing + char):
                begun, self._closing = self._closing, ""
                self._state = self._in_text
                return begun + text[place:]
            self._closing += char
            if self._closing == self.close:
                self._closing = ""
                self._state = self._in_text
                return text[place + 1 :]
        return ""

    def _drop(self, text: str) -> str:
        return ""

    def _start(self, name: str) -> None:
        if not self._started:
            self._started = True
            self._index += 1
            self._deltas.append(CallStart(self._index, self.new_id(), name))

    def _give_up(self, rest: str) -> str:
        """What was read is no call: it becomes content, and `rest` is read as text."""
        if self._call is not None and self._started:
            self._deltas.append(CallBroken(self._index, self._raw))
            self._index -= 1
        else:
            self._show(self._raw)
        self._call, self._raw = None, ""
        self._state = self._in_text
        return rest

    def _show(self, text: str) -> None:
        if text:
            self._deltas.append(Content(text))


def random_name(length: int) -> str:
    """Letters and digits."""
    return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(length))
