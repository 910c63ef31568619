"""Words that an answer may not hold: their last token may not follow the others, as in vLLM."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


class BadWords:
    """One row's words as token sequences, found by the token before their last."""

    def __init__(self, words: Sequence[Sequence[int]]) -> None:
        """`words`: none is empty."""
        self._single = sorted({word[0] for word in words if len(word) == 1})
        self._by_tail: dict[int, list[tuple[int, ...]]] = {}
        for word in words:
            if len(word) > 1:
                self._by_tail.setdefault(word[-2], []).append(tuple(word))

    def completing(self, output: npt.NDArray[np.integer]) -> list[int]:
        """Tokens that would complete a word. output: all tokens of the answer so far."""
        found = list(self._single)
        for word in self._by_tail.get(int(output[-1]), ()) if len(output) else ():
            before = word[:-1]
            if tuple(output[-len(before) :].tolist()) == before:
                found.append(word[-1])
        return found
