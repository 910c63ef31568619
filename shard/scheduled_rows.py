"""What a step computes and samples of an InputBatch's rows. No behaviour."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from headgate.shard.sampling.params import IntArray


@dataclass(frozen=True, slots=True, eq=False)
class ScheduledRows:
    """The live rows a plan computes, in plan order."""

    slots: IntArray  # [R]: where the batch holds them
    counts: IntArray  # [R]: known tokens to compute
    samples: npt.NDArray[np.bool_]  # [R]: all known tokens are computed, so a new one is sampled
    drafts: IntArray  # [R]: guessed tokens to compute after the known ones

    @property
    def lengths(self) -> IntArray:
        """[R]: tokens to compute, guessed ones too."""
        return self.counts + self.drafts


@dataclass(frozen=True, slots=True, eq=False)
class Draws:
    """The S tokens that a step samples: of each row that samples the next one, and one after each
    of its guesses."""

    slots: IntArray  # [S]: where the batch holds their rows
    ahead: IntArray  # [S]: guesses that stand before them

    @classmethod
    def next(cls, slots: IntArray) -> Draws:
        """One token for each row, after those that are known."""
        return cls(slots, np.zeros(len(slots), np.int64))

    def take(self, places: IntArray | slice) -> Draws:
        """Those at these places."""
        return Draws(self.slots[places], self.ahead[places])


@dataclass(frozen=True, slots=True, eq=False)
class ExpectedTokens:
    """The rows of a step that get tokens, as they were when the step began."""

    slots: IntArray
    tenants: IntArray  # who held the slots, see InputBatch.tenants
    positions: IntArray  # of the next tokens in their rows
    drafts: IntArray  # guesses that were computed


def unrolled(counts: IntArray) -> tuple[IntArray, IntArray]:
    """For each of the tokens of rows that have so many: its row, and its place among the row's."""
    rows = np.repeat(np.arange(len(counts)), counts)
    return rows, np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
