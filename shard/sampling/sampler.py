"""Chooses each row's next token: greedy, or by the Gumbel-max rule with the row's own noise.

token = argmax(score + noise), where score is the log-probability (but for a constant of the row)
after watermark, penalties, the row's grammar, temperature and filters, in this order. Runs on
rank 0 only. Where the kernels in use sample on the device they do, by the same rules; what follows
is how it is done in NumPy.

Greedy rows without watermark and penalties are one argmax over the batch. The others are taken one
by one: their arithmetic is over thousands of tokens at a time, so the loop itself costs little, and
no row can have an influence on another.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from headgate.kernels import ops
from headgate.kernels.philox import NOISE_MAX, NOISE_MIN, Draw, gumbel_noise_at
from headgate.shard.sampling.device import allowed_tokens, rows_to_sample, upload_to
from headgate.shard.sampling.filters import (
    Candidates,
    apply_filters,
    floor_of_best,
    has_filters,
)
from headgate.shard.sampling.params import IntArray, SampledRows
from headgate.shard.sampling.penalties import apply_penalties
from headgate.shard.sampling.watermark import apply_watermark

# A score this far below the best cannot win: the noise spans no more.
_HOPELESS = NOISE_MAX - NOISE_MIN


def sample(logits: torch.Tensor, rows: SampledRows) -> IntArray:
    """The next token of each row, int64[R]. logits: float32[R, vocab], left as they are.

    Equal scores go to the lowest id.
    """
    sample_tokens = ops.optional("sample_tokens")
    if sample_tokens is None:
        return sample_on_host(logits, rows)
    on_device = rows_to_sample(rows, logits.shape[1], upload_to(logits.device))
    tokens = sample_tokens(logits, on_device).cpu().numpy()
    watermarked = np.flatnonzero(rows.params["watermark_gamma"] > 0)
    if len(watermarked):  # no kernel has them
        for index, scores in _fetch(logits, watermarked).items():
            tokens[index] = _choose(scores, rows, index)
    return tokens


def sample_on_host(logits: torch.Tensor, rows: SampledRows) -> IntArray:
    """As `sample`, in NumPy."""
    tokens = ops.argmax(logits)
    special = rows.params["temperature"] > 0
    special[[*rows.histories, *rows.banned, *rows.allowed, *rows.biases]] = True
    indices = np.flatnonzero(special)
    if not len(indices):
        return tokens
    host = logits.numpy() if logits.device.type == "cpu" else _fetch(logits, indices)
    for index in indices.tolist():
        tokens[index] = _choose(host[index], rows, index)
    return tokens


def _fetch(logits: torch.Tensor, indices: IntArray) -> dict[int, npt.NDArray[np.float32]]:
    """Some rows of a tensor on a device."""
    rows = logits[torch.from_numpy(indices).to(logits.device)].cpu().numpy()
    return dict(zip(indices.tolist(), rows, strict=True))


def _choose(scores: npt.NDArray[np.float32], rows: SampledRows, index: int) -> int:
    """The token of one row. scores: float32[vocab], its logits, left as they are."""
    params = rows.params[index]
    if index in rows.biases:
        scores = scores.copy()
        rows.biases[index].apply(scores)
    if index in rows.histories:
        scores = scores.copy()
        history = rows.histories[index]
        apply_watermark(scores, int(history.token_ids[-1]), params)
        apply_penalties(scores, history, params)
    if index in rows.allowed:
        scores = np.where(allowed_tokens(rows, index), scores, np.float32(-np.inf))
    elif index in rows.banned:
        scores = scores.copy()
        scores[rows.banned[index]] = -np.inf
    best = int(scores.argmax())
    # Of a broken model's infinite or undefined logits, too, some token is taken.
    if not params["temperature"] or not np.isfinite(scores[best]):
        return best
    draw = Draw(int(params["seed"]), int(rows.output_positions[index]), int(params["sample_index"]))
    if not has_filters(params):
        largest, temperature = float(scores[best]), float(params["temperature"])
        return ops.gumbel_argmax(scores, largest, temperature, draw)
    candidates = apply_filters(_candidates(scores, best, params), params)
    noise = gumbel_noise_at(draw, candidates.ids)
    return int(candidates.ids[(candidates.scores + noise).argmax()])


def _candidates(scores: npt.NDArray[np.float32], best: int, params: np.void) -> Candidates:
    """The tokens that have a chance; the best one's score is 0."""
    temperature = params["temperature"]
    floor = scores[best] - np.float32(_HOPELESS) * temperature
    if params["top_k"]:
        floor = max(floor, floor_of_best(scores, int(params["top_k"])))
    ids = np.flatnonzero(scores >= floor)
    # The best score is 0 before the division: however small the temperature, nothing overflows.
    return Candidates(ids, (scores[ids] - scores[best]) / temperature)
