"""Logprobs under the model's own distribution: before penalties, temperature and filters."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from headgate.proto.messages import TopTokens
from headgate.shard.sampling.filters import keep_best

NO_TOP = TopTokens((), ())


def token_logprobs(
    logits: torch.Tensor, token_ids: npt.NDArray[np.int64], top_n: Sequence[int]
) -> tuple[list[float], list[TopTokens]]:
    """The logprob of each row's token, and each row's `top_n` best tokens.

    logits: float32[R, vocab]; token_ids: int64[R]; the second list is empty when no row wants any.
    """
    logprobs = torch.log_softmax(logits, dim=1)
    index = torch.from_numpy(token_ids).to(logits.device).unsqueeze(1)
    chosen = logprobs.gather(1, index).squeeze(1).tolist()
    most = max(top_n, default=0)
    if not most:
        return chosen, []
    ids, values = best_tokens(logprobs, most)
    return chosen, [
        TopTokens(row_ids[:n], row_values[:n]) if n else NO_TOP
        for row_ids, row_values, n in zip(ids.tolist(), values.tolist(), top_n, strict=True)
    ]


def best_tokens(scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids int64[R, count], scores[R, count]), best first; equal scores in order of id.

    Exactly `count` (at most the vocabulary's size) per row. NaN counts as the worst.
    """
    count = min(count, scores.shape[1])
    scores = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    edge = scores.topk(count, dim=1).values[:, -1]
    kept = keep_best(scores, torch.full_like(edge, count, dtype=torch.int64), edge)
    ids = kept.nonzero()[:, 1].view(-1, count)
    values, order = scores.gather(1, ids).sort(dim=1, descending=True, stable=True)
    return ids.gather(1, order), values
