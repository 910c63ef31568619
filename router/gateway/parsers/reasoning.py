"""Reasoning between `<think>` and `</think>`, as DeepSeek's R1, Qwen3 and others write it.

Only at the beginning of an answer: a tag further on is text. White space around the tags is
dropped.
"""

from __future__ import annotations

from collections.abc import Callable

from headgate.router.gateway.parsers.deltas import Delta, Parser, Reasoning, merged
from headgate.router.gateway.parsers.json_call import SPACE
from headgate.router.gateway.parsers.tool_parser import MarkFinder

OPEN = "<think>"
CLOSE = "</think>"


class ReasoningParser:
    """A Parser that hands what follows the reasoning to another one."""

    def __init__(self, inner: Parser, *, begun: bool) -> None:
        """`begun`: the prompt holds the opening tag, so that the answer begins behind it."""
        self._inner = inner
        self._finder = MarkFinder(CLOSE)
        self._held = ""
        self._begun = begun
        self._state: Callable[[str], str] = self._at_start
        self._deltas: list[Delta] = []

    def feed(self, text: str) -> list[Delta]:
        self._deltas = []
        while text:
            text = self._state(text)
        return merged(self._deltas)

    def finish(self, truncated: bool) -> list[Delta]:
        self._deltas = []
        held, rest = self._held, self._finder.flush()
        if held and not self._begun:
            self._deltas += self._inner.feed(held)
        elif (held + rest).strip(SPACE):
            self._deltas.append(Reasoning(held + rest))
        self._deltas += self._inner.finish(truncated)
        return merged(self._deltas)

    def _at_start(self, text: str) -> str:
        """Until it is clear whether a tag opens the answer."""
        self._held += text
        begun = self._held.lstrip(SPACE)
        if begun.startswith(OPEN):
            self._state, self._held = self._before_reasoning, ""
            return begun[len(OPEN) :]
        if OPEN.startswith(begun):
            return ""
        held, self._held = self._held, ""
        self._state = self._before_reasoning if self._begun else self._in_answer
        return held

    def _before_reasoning(self, text: str) -> str:
        text = text.lstrip(SPACE)
        if text:
            self._state = self._in_reasoning
        return text

    def _in_reasoning(self, text: str) -> str:
        shown, _, after = self._finder.push(text)
        if shown:
            self._deltas.append(Reasoning(shown))
        if after is None:
            return ""
        self._state = self._before_answer
        return after

    def _before_answer(self, text: str) -> str:
        text = text.lstrip(SPACE)
        if text:
            self._state = self._in_answer
        return text

    def _in_answer(self, text: str) -> str:
        self._deltas += self._inner.feed(text)
        return ""
