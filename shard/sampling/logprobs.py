"""Logprobs under the model's own distribution: before penalties, temperature and filters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from headgate.kernels import ops
from headgate.proto.messages import TopTokens

NO_TOP = TopTokens((), ())


def token_logprobs(
    logits: torch.Tensor, token_ids: npt.NDArray[np.int64], top_n: Sequence[int]
) -> tuple[list[float], list[TopTokens]]:
    """The logprob of each row's token, and each row's `top_n` best tokens.

    logits: float32[R, vocab]; token_ids: int64[R]; the second list is empty when no row wants any.
    """
    index = torch.from_numpy(token_ids).to(logits.device)
    found = logprobs_on_device(logits, index, max(top_n, default=0))
    return read_logprobs([tensor.cpu().numpy() for tensor in found], top_n)


def logprobs_on_device(
    logits: torch.Tensor, tokens: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(float32[R]: of each row's token, int64[R, count]: its likeliest, float32[R, count]: theirs).

    No synchronisation where the kernels in use have this operation.
    """
    compute = ops.optional("token_logprobs") or _logprobs_and_best
    return compute(logits, tokens, count)


def read_logprobs(
    found: Sequence[npt.NDArray[Any]], top_n: Sequence[int]
) -> tuple[list[float], list[TopTokens]]:
    """What `token_logprobs` returns, from the three arrays that `logprobs_on_device` found."""
    chosen, ids, values = (array.tolist() for array in found)
    if not max(top_n, default=0):
        return chosen, []
    return chosen, [
        TopTokens(row_ids[:n], row_values[:n]) if n else NO_TOP
        for row_ids, row_values, n in zip(ids, values, top_n, strict=True)
    ]


def _logprobs_and_best(
    logits: torch.Tensor, tokens: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logprob of each row's token, the `count` best tokens, their logprobs)."""
    logprobs = torch.log_softmax(logits, dim=1)
    chosen = logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1)
    if not count:
        return chosen, tokens.new_empty((len(tokens), 0)), chosen.new_empty((len(tokens), 0))
    return chosen, *best_tokens(logprobs, count)


def best_tokens(scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids int64[R, count], scores[R, count]), best first; equal scores in order of id.

    Exactly `count` (at most the vocabulary's size) per row. NaN counts as the worst.
    """
    vocab_size = scores.shape[1]
    values, ids = scores.topk(min(count + 1, vocab_size), dim=1)
    if count < vocab_size and bool((~(values[:, count - 1] > values[:, count])).any()):
        # Which of the equals at the edge topk takes is not defined: sort those rows in full.
        unclear = (~(values[:, count - 1] > values[:, count])).nonzero().squeeze(1)
        worst_last = scores[unclear].nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        ordered = worst_last.sort(dim=1, descending=True, stable=True)
        values[unclear] = ordered.values[:, : count + 1]
        ids[unclear] = ordered.indices[:, : count + 1]
    ids, by_id = ids[:, :count].sort(dim=1)
    values, by_value = values[:, :count].gather(1, by_id).sort(dim=1, descending=True, stable=True)
    return ids.gather(1, by_value), values
