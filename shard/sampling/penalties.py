"""What a row's tokens so far do to its scores: penalties, and tokens it may not take yet."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from headgate.shard.sampling.params import IntArray, SampledRows


def has_penalty(params: npt.NDArray[np.void]) -> npt.NDArray[np.bool_]:
    """bool[R]: rows with a repetition, frequency or presence penalty. params: PARAMS_DTYPE[R]."""
    return (
        (params["repetition_penalty"] != 1)
        | (params["frequency_penalty"] != 0)
        | (params["presence_penalty"] != 0)
    )


def apply_penalties(scores: torch.Tensor, rows: SampledRows) -> None:
    """Penalises, in place, the tokens that `rows` hold in their history. scores: float32[R, vocab].

    Repetition (of prompt and output) divides positive and multiplies negative scores, once per
    distinct token. Frequency takes its penalty off for each occurrence in the output, presence once
    for a token that occurs there at all; both count as OpenAI's API does.
    """
    vocab_size = scores.shape[1]
    keys = rows.history_rows * vocab_size + rows.history_ids
    flat = scores.view(-1)
    _divide_repeated(flat, np.unique(keys), rows, vocab_size)
    _subtract_counts(flat, keys[rows.history_is_output], rows, vocab_size)


def _divide_repeated(
    flat: torch.Tensor, keys: IntArray, rows: SampledRows, vocab_size: int
) -> None:
    penalty = rows.params["repetition_penalty"][keys // vocab_size]
    keys, penalty = keys[penalty != 1], penalty[penalty != 1]
    if not len(keys):
        return
    index = torch.from_numpy(keys).to(flat.device)
    factor = torch.from_numpy(penalty).to(flat.device)
    old = flat[index]
    flat[index] = torch.where(old < 0, old * factor, old / factor)


def _subtract_counts(
    flat: torch.Tensor, keys: IntArray, rows: SampledRows, vocab_size: int
) -> None:
    keys, counts = np.unique(keys, return_counts=True)
    params = rows.params[keys // vocab_size]
    penalty = params["frequency_penalty"] * counts.astype(np.float32) + params["presence_penalty"]
    if not penalty.any():
        return
    index = torch.from_numpy(keys).to(flat.device)
    flat[index] -= torch.from_numpy(penalty).to(flat.device)


def ban_tokens(scores: torch.Tensor, rows: SampledRows) -> None:
    """Sets the scores of banned tokens to -inf, in place. scores: float32[R, vocab]."""
    if len(rows.banned_rows):
        scores[torch.from_numpy(rows.banned_rows), torch.from_numpy(rows.banned_ids)] = -torch.inf
