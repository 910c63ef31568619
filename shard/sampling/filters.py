"""Which tokens may be sampled at all: top-k, then top-p, then typical-p, then min-p.

Each filter sees the distribution that the one before left, renormalised, and sets the scores of the
tokens it drops to -inf. Where tokens tie at a filter's edge, the lowest ids stay. A row's outcome
does not depend on the other rows: sums run in one order (cumsum), never in parallel halves.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

Filter = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# Sorting a whole vocabulary takes milliseconds; nearly always this many tokens hold the top-p mass.
_USUAL_NUCLEUS = 1024


def apply_filters(scores: torch.Tensor, params: npt.NDArray[np.void]) -> None:
    """Applies each row's filters in place. scores: float32[R, vocab], log-probabilities."""
    top_k, min_p = params["top_k"], params["min_p"]
    filters: tuple[tuple[Filter, np.ndarray, np.ndarray], ...] = (
        (_top_k, top_k, (top_k > 0) & (top_k < scores.shape[1])),
        (_top_p, params["top_p"], params["top_p"] < 1),
        (_typical_p, params["typical_p"], params["typical_p"] < 1),
        (_min_p, min_p, min_p > 0),
    )
    for keep, values, active in filters:
        if not active.any():
            continue
        rows = torch.from_numpy(np.flatnonzero(active)).to(scores.device)
        limits = torch.from_numpy(values[active]).to(scores.device)
        subset = scores[rows]
        scores[rows] = subset.masked_fill(~keep(subset, limits), -torch.inf)


def keep_best(scores: torch.Tensor, count: torch.Tensor, edge: torch.Tensor) -> torch.Tensor:
    """bool[R, V]: the `count` best of each row; `edge` is the row's count-th best score."""
    edge, count = edge.unsqueeze(1), count.unsqueeze(1)
    better = scores > edge
    tied = scores == edge
    places = count - better.sum(1, keepdim=True)
    if bool((tied.sum(1, keepdim=True) > places).any()):
        tied &= tied.cumsum(1) <= places
    return better | tied


def _top_k(scores: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    best = scores.topk(int(k.max()), dim=1).values
    return keep_best(scores, k, best.gather(1, k.unsqueeze(1) - 1).squeeze(1))


def _top_p(scores: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """The fewest tokens, best first, that together have at least probability p."""
    logprobs = torch.log_softmax(scores, dim=1)
    best = logprobs.topk(min(_USUAL_NUCLEUS, scores.shape[1]), dim=1).values
    mass = best.double().exp().cumsum(1)
    count = _count_until(mass, p)
    edge = best.gather(1, count.unsqueeze(1) - 1).squeeze(1)
    short = (mass[:, -1] < p).nonzero().squeeze(1)
    if len(short) and best.shape[1] < scores.shape[1]:
        ordered = logprobs[short].sort(dim=1, descending=True).values
        count[short] = _count_until(ordered.double().exp().cumsum(1), p[short])
        edge[short] = ordered.gather(1, count[short].unsqueeze(1) - 1).squeeze(1)
    return keep_best(logprobs, count, edge)


def _typical_p(scores: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """The fewest tokens, of most usual surprise first, that have at least probability p."""
    logprobs = torch.log_softmax(scores, dim=1)
    probs = logprobs.double().exp()
    surprise = -logprobs
    entropy = torch.where(probs > 0, probs * surprise, 0.0).cumsum(1)[:, -1:]
    unusual = (surprise - entropy).abs()
    order = unusual.sort(dim=1, stable=True).indices
    count = _count_until(probs.gather(1, order).cumsum(1), p)
    places = torch.arange(scores.shape[1], device=scores.device)
    kept = places < count.unsqueeze(1)
    return torch.zeros_like(kept).scatter_(1, order, kept)


def _min_p(scores: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Tokens at least p times as likely as the best one."""
    return scores >= scores.amax(1, keepdim=True) + p.log().unsqueeze(1)


def _count_until(mass: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """int64[R]: how many leading tokens reach mass p. mass: float64[R, n], cumulative."""
    return ((mass < p.unsqueeze(1)).sum(1) + 1).clamp_(max=mass.shape[1])
