"""What a parser makes of an answer's text, piece by piece, and the whole that pieces add up to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the reader."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text that the model wrote for itself."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A tool call begins. `index` counts the answer's calls from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the last call's arguments: a piece of a JSON object's text."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """The last call is complete: its arguments are a JSON object."""

    index: int


@dataclass(frozen=True, slots=True)
class CallBroken:
    """The last call turned out to be none. `text`: all of it, as the model wrote it."""

    index: int
    text: str


Delta = Content | Reasoning | CallStart | CallArguments | CallEnd | CallBroken


class Parser(Protocol):
    """One answer's parser. Its results don't depend on how the text is cut into pieces."""

    def feed(self, text: str) -> list[Delta]:
        """Takes the next piece of the text."""

    def finish(self, truncated: bool) -> list[Delta]:
        """The text has ended. `truncated`: by its length, so that a call may lack its end."""


class PlainParser:
    """All text is content."""

    def feed(self, text: str) -> list[Delta]:
        return [Content(text)] if text else []

    def finish(self, truncated: bool) -> list[Delta]:
        return []


@dataclass(slots=True)
class ToolCall:
    """A call as a client gets it. `arguments`: JSON text, incomplete if the answer was cut."""

    id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class ParsedAnswer:
    """What all deltas of an answer add up to. A call that broke is content."""

    content: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)

    @classmethod
    def of(cls, parser: Parser, text: str, truncated: bool) -> ParsedAnswer:
        """Parses a whole text."""
        answer = cls()
        answer.add(parser.feed(text))
        answer.add(parser.finish(truncated))
        return answer

    def add(self, deltas: Iterable[Delta]) -> None:
        for delta in deltas:
            if isinstance(delta, Content):
                self.content += delta.text
            elif isinstance(delta, Reasoning):
                self.reasoning += delta.text
            elif isinstance(delta, CallStart):
                self.calls.append(ToolCall(delta.id, delta.name))
            elif isinstance(delta, CallArguments):
                self.calls[-1].arguments += delta.text
            elif isinstance(delta, CallBroken):
                self.calls.pop()
                self.content += delta.text


def merged(deltas: Iterable[Delta]) -> list[Delta]:
    """The same with neighbouring pieces of one kind joined."""
    result: list[Delta] = []
    for delta in deltas:
        last = result[-1] if result else None
        if isinstance(delta, Content) and isinstance(last, Content):
            result[-1] = Content(last.text + delta.text)
        elif isinstance(delta, Reasoning) and isinstance(last, Reasoning):
            result[-1] = Reasoning(last.text + delta.text)
        elif isinstance(delta, CallArguments) and isinstance(last, CallArguments):
            result[-1] = CallArguments(last.index, last.text + delta.text)
        else:
            result.append(delta)
    return result
