"""Guesses of a row's next tokens from what came before: after the same tokens, the same again.

Prompt lookup, or n-gram speculation: texts quote their prompts and repeat themselves. It costs no
model, and what it guesses is checked by the step that computes it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

# Guesses that a step has room for, for each of its rows, from which on more of them pay.
ROOM_TO_TRY = 6
ROOM_TO_DARE = 16


def guess(token_ids: npt.NDArray[np.int32], known: int, most: int, room: int) -> int:
    """Writes up to `most` guesses into `token_ids` from place `known` on; how many.

    Of all places where the last known tokens occurred before, those count where the most of them
    agree, up to `most` + 1, and of these the last. The more agree, the surer is what followed, and
    so much of it is the guess (`worth_trying`). What follows may be the guess itself, which so goes
    on with a loop. `room`: guesses that the step has room for, for each of its rows.
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
    count = min(worth_trying(agreed, room), most) if agreed else 0
    for place in range(known, known + count):
        token_ids[place] = token_ids[last + 1 + place - known]
    return count


def worth_trying(agreed: int, room: int) -> int:
    """How many guesses to make where so many tokens agree.

    A wrong one costs its part of the step, a right one saves the row a step: the fewer rows share
    steps, and the more tokens make no long one, the less likely a guess has to be.
    """
    if room >= ROOM_TO_DARE:
        return 2 * agreed
    return agreed if room >= ROOM_TO_TRY else agreed - 1
