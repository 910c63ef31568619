"""Guesses of a row's next tokens from what came before: after the same tokens, the same again.

Prompt lookup, or n-gram speculation: texts quote their prompts and repeat themselves. It costs no
model, and what it guesses is checked by the step that computes it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def guess(token_ids: npt.NDArray[np.int32], known: int, most: int) -> int:
    """Writes up to `most` guesses into `token_ids` from place `known` on; how many.

    Of all places where the last known tokens occurred before, those count where the most of them
    agree, up to `most` + 1, and of these the last. If m tokens agree, the m - 1 that followed are
    the guess: the more agree, the surer it is. What follows may be the guess itself, which so goes
    on with a loop.
    """
    if most < 1 or known < 2:
        return 0
    ends = np.flatnonzero(token_ids[: known - 1] == token_ids[known - 1])
    agreed = 0
    while len(ends) and agreed <= most:
        agreed += 1
        last = ends[-1]
        ends = ends[ends >= agreed]
        ends = ends[token_ids[ends - agreed] == token_ids[known - 1 - agreed]]
    for place in range(known, known + agreed - 1):
        token_ids[place] = token_ids[last + 1 + place - known]
    return max(agreed - 1, 0)
