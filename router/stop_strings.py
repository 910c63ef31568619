"""Finds stop texts in an answer as it grows, wherever token boundaries fall.

Knows nothing of tokens. The stop text that is complete first ends the answer; of
several that end at the same character the longest counts.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Releases text up to a stop text.

    With `include` the stop text belongs to the answer; without, it is cut off, and text
    that may be the beginning of one is held back until the next characters decide.
    """

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        self.stops = tuple(sorted(stops, key=len, reverse=True))
        self._fallbacks = [[0, 0] for _ in self.stops]  # see _next_fallback
        self._states = [0] * len(self.stops)  # characters of each stop matched so far
        self._include = include
        self._held = ""
        self.matched: str | None = None  # the stop text found; nothing is released after it

    def push(self, text: str) -> str:
        """Takes the next text of the answer; gives what can be released."""
        if not self.stops:
            return text
        if self.matched is not None:
            return ""
        for position, character in enumerate(text):
            matched = self._advance(character)
            if matched is not None:
                self.matched = matched
                seen = self._held + text[: position + 1]
                self._held = ""
                return seen if self._include else seen[: len(seen) - len(matched)]
        seen = self._held + text
        keep = 0 if self._include else max(self._states)
        self._held = seen[len(seen) - keep :]
        return seen[: len(seen) - keep]

    def flush(self) -> str:
        """The answer ended otherwise: what was held back is text after all."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> str | None:
        found = None
        for i, stop in enumerate(self.stops):
            state, fallbacks = self._states[i], self._fallbacks[i]
            while state and stop[state] != character:
                state = fallbacks[state]
            if stop[state] == character:
                state += 1
                if state == len(fallbacks):
                    fallbacks.append(_next_fallback(stop, fallbacks))
            if state == len(stop):
                found = found or stop  # sorted: the longest comes first
                state = fallbacks[state]
            self._states[i] = state
        return found


def _next_fallback(pattern: str, table: list[int]) -> int:
    """How many characters stay matched when the one after the first len(table) differs.

    (The longest proper prefix of that part of the pattern that is also its suffix: Knuth, Morris
    and Pratt. Their table grows with what is matched: stop texts may be a megabyte.)
    """
    k = len(table) - 1
    state = table[k]
    while state and pattern[state] != pattern[k]:
        state = table[state]
    return state + 1 if pattern[state] == pattern[k] else 0
