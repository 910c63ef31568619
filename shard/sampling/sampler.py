"""Chooses each row's next token: greedy, or by the Gumbel-max rule with the row's own noise.

token = argmax(score + noise), where score is the log-probability after penalties, temperature and
filters, in this order. What other rows are in the batch changes nothing. Runs on rank 0 only.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import torch

from headgate.shard.sampling.filters import apply_filters
from headgate.shard.sampling.params import IntArray, SampledRows
from headgate.shard.sampling.penalties import apply_penalties, ban_tokens, has_penalty
from headgate.shard.sampling.philox import NOISE_MAX, NOISE_MIN, gumbel_noise, gumbel_noise_at

# A score this far below the best cannot win: the noise spans no more.
_HOPELESS = NOISE_MAX - NOISE_MIN
# Up to this part of the vocabulary it is cheaper to draw noise token by token than for all.
_SPARSE = 1 / 8


def sample(logits: torch.Tensor, rows: SampledRows) -> IntArray:
    """The next token of each row, int64[R]. logits: float32[R, vocab], left as they are.

    Equal scores go to the lowest id. A greedy row without penalties costs one argmax.
    """
    tokens = argmax(logits)
    random = rows.params["temperature"] > 0
    penalized = has_penalty(rows.params)
    warped = random | penalized
    warped[rows.banned_rows] = True
    if not warped.any():
        return tokens
    chosen = np.flatnonzero(warped)
    scores = logits[torch.from_numpy(chosen).to(logits.device)]
    part = _part(rows, chosen)
    if len(part.history_ids):
        apply_penalties(scores, part)
    ban_tokens(scores, part)
    tokens[chosen] = argmax(scores)
    if random.any():
        tokens[np.flatnonzero(random)] = _sample_randomly(
            scores[torch.from_numpy(random[chosen]).to(scores.device)], rows, random
        )
    return tokens


def argmax(scores: torch.Tensor) -> IntArray:
    """Index of each row's largest score, the first of equals."""
    if scores.device.type == "cpu":
        return scores.numpy().argmax(axis=1)  # ten times as fast as torch's
    return scores.argmax(dim=1).cpu().numpy()


def _part(rows: SampledRows, chosen: IntArray) -> SampledRows:
    """The rows `chosen`, renumbered; all that have a history or a ban are among them."""
    new_index = np.zeros(len(rows), np.int64)
    new_index[chosen] = np.arange(len(chosen))
    return dataclasses.replace(
        rows,
        params=rows.params[chosen],
        output_positions=rows.output_positions[chosen],
        banned_rows=new_index[rows.banned_rows],
        history_rows=new_index[rows.history_rows],
    )


def _sample_randomly(
    scores: torch.Tensor, rows: SampledRows, random: npt.NDArray[np.bool_]
) -> IntArray:
    """scores: float32[S, vocab] of the rows where `random` is true, after penalties."""
    params, positions = rows.params[random], rows.output_positions[random]
    temperature = torch.from_numpy(params["temperature"].copy()).to(scores.device).unsqueeze(1)
    # The best score is 0 before the division: however small the temperature, nothing overflows.
    scores = (scores - scores.amax(1, keepdim=True)) / temperature
    scores = torch.log_softmax(scores, dim=1)
    apply_filters(scores, params)
    host = scores.cpu().numpy()
    return np.array(
        [
            _gumbel_max(
                host[index],
                int(params["seed"][index]),
                int(positions[index]),
                int(params["sample_index"][index]),
            )
            for index in range(len(host))
        ],
        dtype=np.int64,
    )


def _gumbel_max(
    scores: npt.NDArray[np.float32], seed: int, output_position: int, sample_index: int
) -> int:
    """One row's winner; tokens without a chance get no noise. scores: float32[vocab]."""
    # Not ">=": of a broken model's NaNs, too, some token is taken.
    candidates = np.flatnonzero(~(scores < scores.max() - np.float32(_HOPELESS)))
    if len(candidates) <= len(scores) * _SPARSE:
        noise = gumbel_noise_at(seed, output_position, sample_index, candidates)
        return int(candidates[(scores[candidates] + noise).argmax()])
    return int((scores + gumbel_noise(seed, output_position, sample_index, len(scores))).argmax())
