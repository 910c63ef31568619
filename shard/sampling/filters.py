"""Which tokens may be sampled at all: top-k, then top-p, then typical-p, then min-p.

Each filter sees the distribution that the one before left, renormalised. Where tokens tie at a
filter's edge, the lowest ids stay.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from headgate.shard.sampling.params import IntArray

FloatArray = npt.NDArray[np.float32]

_GROUP = 32  # tokens


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """Tokens of one row, in order of id."""

    ids: IntArray
    scores: FloatArray  # log-probabilities but for a constant of the row

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, kept: npt.NDArray[np.bool_] | IntArray) -> Candidates:
        """Some of them: a mask, or ascending indices."""
        return Candidates(self.ids[kept], self.scores[kept])


def has_filters(params: np.void) -> bool:
    """Whether the row's filters may leave less than everything. params: the row's record."""
    return bool(
        params["top_k"] > 0 or params["top_p"] < 1 or params["typical_p"] < 1 or params["min_p"] > 0
    )


def apply_filters(candidates: Candidates, params: np.void) -> Candidates:
    """Those that the row's filters leave, at least one. params: the row's record."""
    if 0 < params["top_k"] < len(candidates):
        candidates = candidates.take(_best(candidates.scores, int(params["top_k"])))
    if params["top_p"] < 1:
        candidates = _top_p(candidates, float(params["top_p"]))
    if params["typical_p"] < 1:
        candidates = _typical_p(candidates, float(params["typical_p"]))
    if params["min_p"] > 0:
        floor = candidates.scores.max() + np.log(params["min_p"])
        candidates = candidates.take(candidates.scores >= floor)
    return candidates


def floor_of_best(scores: FloatArray, count: int) -> np.float32:
    """A score that the `count` best reach and few others do; found faster than they are.

    Of groups of tokens as many have a best score that reaches it.
    """
    num_groups = len(scores) // _GROUP
    if count > num_groups:
        return np.float32(-np.inf)
    best = scores[: num_groups * _GROUP].reshape(_GROUP, num_groups).max(axis=0)
    return np.partition(best, num_groups - count)[num_groups - count]


def _best(scores: FloatArray, count: int) -> npt.NDArray[np.bool_]:
    """Mask of the `count` best."""
    place = len(scores) - count
    return _down_to(scores, np.partition(scores, place)[place], count)


def _down_to(scores: FloatArray, edge: np.float32, count: int) -> npt.NDArray[np.bool_]:
    """Mask of the `count` best, where `edge` is the count-th best score."""
    kept = scores > edge
    ties = np.flatnonzero(scores == edge)
    kept[ties[: count - np.count_nonzero(kept)]] = True
    return kept


def _top_p(candidates: Candidates, p: float) -> Candidates:
    """The fewest tokens, best first, that together have at least probability p."""
    probs = _probabilities(candidates.scores)
    # However many fall below this, together they have less than 1 - p: no need to sort them.
    likely = probs >= (1 - p) / len(probs)
    candidates = candidates.take(likely)
    count = _count_until(np.sort(probs[likely])[::-1], p)
    return candidates.take(_best(candidates.scores, count))


def _typical_p(candidates: Candidates, p: float) -> Candidates:
    """The fewest tokens, of most usual surprise first, that have at least probability p."""
    probs = _probabilities(candidates.scores)
    best = int(candidates.scores.argmax())
    surprise = candidates.scores[best] - candidates.scores - np.log(probs[best])
    entropy = np.float32((probs * surprise).sum(dtype=np.float64))
    order = _ascending(np.abs(surprise - entropy))
    count = _count_until(probs[order], p)
    return candidates.take(np.sort(order[:count]))


def _probabilities(scores: FloatArray) -> FloatArray:
    weights = np.exp(scores - scores.max())
    return weights / np.float32(weights.sum(dtype=np.float64))


def _count_until(probs: FloatArray, p: float) -> int:
    """How many leading tokens reach mass p, at least 1."""
    mass = probs.cumsum(dtype=np.float64)
    return min(int(np.searchsorted(mass, p)) + 1, len(probs))


def _ascending(values: FloatArray) -> IntArray:
    """Indices that sort values >= 0, equals in order of index: a stable argsort, but faster."""
    # The bits of floats that are not negative have the floats' order; the index breaks ties.
    keys = values.view(np.uint32).astype(np.uint64) << np.uint64(32)
    keys |= np.arange(len(values), dtype=np.uint64)
    keys.sort()
    return (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)
