"""Sampling on the device against the sampler in NumPy, which is the definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from headgate.kernels.philox import Draw, gumbel_noise_at
from headgate.kernels.triton import logprobs, sampling
from headgate.proto.messages import RowSampling
from headgate.shard.sampling.device import rows_to_sample, upload_to
from headgate.shard.sampling.params import History, SampledRows, params_array
from headgate.shard.sampling.sampler import sample_on_host
from headgate.shard.sampling.token_bias import TokenBias
from tests.kernels.randoms import Randoms

# Each kind of parameters that there is, and some together.
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.01},
    {"temperature": 0.7, "top_k": 1},
    {"temperature": 1.5, "top_k": 40},
    {"temperature": 1.0, "top_k": 100_000},
    {"temperature": 1.0, "top_p": 0.5},
    {"temperature": 2.0, "top_p": 0.999},
    {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 1.0, "typical_p": 0.4},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 1.2, "top_k": 30, "top_p": 0.8, "typical_p": 0.9, "min_p": 0.05},
    {"temperature": 1.0, "repetition_penalty": 1.3},
    {"temperature": 0.0, "frequency_penalty": 0.5, "presence_penalty": 1.0},
    {"temperature": 1.0, "repetition_penalty": 0.8, "frequency_penalty": -0.5, "top_k": 9},
]


def made_rows(randoms: Randoms, vocabulary: int, copies: int = 1) -> SampledRows:
    """A row of every kind, `copies` times, with histories where they matter."""
    kinds = KINDS * copies
    seeds = randoms.integers(0, 2**62, len(kinds)).tolist()
    params = params_array(
        [
            RowSampling(max_new_tokens=9, seed=seed * 4 + 3, sample_index=index % 3, **kind)
            for index, (kind, seed) in enumerate(zip(kinds, seeds, strict=True))
        ]
    )
    histories = {
        index: History(randoms.integers(0, vocabulary, 50).cpu().numpy(), 20)
        for index, kind in enumerate(kinds)
        if any("penalty" in name for name in kind)
    }
    positions = randoms.integers(0, 1000, len(kinds)).cpu().numpy()
    return SampledRows(params, positions, histories)


def both(logits: torch.Tensor, rows: SampledRows) -> tuple[list[int], list[int]]:
    """(tokens from the device, from NumPy)."""
    before = logits.clone()
    described = rows_to_sample(rows, logits.shape[1], upload_to(logits.device))
    ours = sampling.sample_tokens(logits, described)
    torch.testing.assert_close(logits, before, rtol=0, atol=0, equal_nan=True)
    return ours.tolist(), sample_on_host(logits, rows).tolist()


@pytest.mark.parametrize(
    "vocabulary",
    [259, 5, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (1, 4096, 4097, 40_000))],
)
def test_tokens_are_those_of_the_sampler_in_numpy(randoms: Randoms, vocabulary: int) -> None:
    rows = made_rows(randoms, vocabulary)
    ours, theirs = both(randoms(len(rows), vocabulary) * 3, rows)
    assert ours == theirs


def test_equal_scores_go_to_the_lowest_ids(randoms: Randoms) -> None:
    rows = made_rows(randoms, 100, copies=2)
    logits = (randoms(len(rows), 100) * 2).round()
    ours, theirs = both(logits, rows)
    assert ours == theirs


def test_rows_of_infinities_and_nan(randoms: Randoms) -> None:
    logits = randoms(4, 64)
    logits[0, :] = -torch.inf
    logits[1, :] = -torch.inf
    logits[1, 17] = 1.0
    logits[2, 33] = torch.inf
    logits[3, 5] = torch.nan
    for temperature in (0.0, 1.0):
        params = params_array([RowSampling(1, temperature=temperature, top_p=0.9, seed=1)] * 4)
        ours, theirs = both(logits, SampledRows(params, np.arange(4)))
        assert ours == theirs == [0, 17, 33, 5]


def test_masks_and_bans(randoms: Randoms) -> None:
    params = params_array([RowSampling(1, temperature=1.0, seed=n) for n in range(5)])
    few, one = np.zeros(70, np.bool_), np.zeros(70, np.bool_)
    few[[0, 31, 32, 63, 69]] = True
    one[69] = True
    banned = {0: np.array([3, 40]), 2: np.array([0, 31]), 3: np.array([69])}
    allowed = {1: one, 2: few, 3: one}  # the only token left to row 3 is banned: it stays
    rows = SampledRows(params, np.arange(5), banned=banned, allowed=allowed)
    for _ in range(5):
        ours, theirs = both(randoms(5, 70) * 2, rows)
        assert ours == theirs
        assert ours[1] == ours[3] == 69
        assert ours[2] in (32, 63, 69)


def test_biases_come_before_penalties(randoms: Randoms) -> None:
    params = params_array(
        [RowSampling(1, temperature=t, repetition_penalty=r) for t in (0, 1) for r in (1, 2)]
    )
    ids, values = np.array([3, 9]), np.array([80, 60], np.float32)
    biases = {row: TokenBias(ids, values, None) for row in (0, 1, 3)}
    histories = {row: History(np.array([3, 3, 7]), 1) for row in (1, 3)}
    rows = SampledRows(params, np.arange(4), histories, biases=biases)
    ours, theirs = both(randoms(4, 40), rows)
    assert ours == theirs
    assert ours[0] == 3 and ours[1] == ours[3] == 9


def test_a_row_has_the_same_token_at_1_7_and_64_rows(randoms: Randoms) -> None:
    kinds = [KINDS[5], *KINDS[9:], *([KINDS[1]] * 57)]
    params = params_array([RowSampling(9, seed=n, **kind) for n, kind in enumerate(kinds)])
    histories = {index: History(np.arange(40), 20) for index in (4, 5, 6)}
    logits = randoms(len(kinds), 300) * 2

    def tokens(first: int, last: int) -> list[int]:
        part = {row - first: history for row, history in histories.items() if first <= row < last}
        rows = SampledRows(params[first:last], np.arange(first, last), part)
        described = rows_to_sample(rows, 300, upload_to(logits.device))
        return sampling.sample_tokens(logits[first:last], described).tolist()

    whole = tokens(0, 64)
    assert tokens(0, 7) == whole[:7]
    for row in (3, 6):
        assert tokens(row, row + 1) == whole[row : row + 1]


def test_noise_is_philox_s(randoms: Randoms) -> None:
    """A flat row's token is the one with the largest noise."""
    seeds = [0, 1, 2**63, 2**64 - 1]
    params = params_array(
        [RowSampling(1, temperature=1.0, seed=seed, sample_index=3) for seed in seeds]
    )
    rows = SampledRows(params, np.array([0, 1, 77, 2**20]))
    ours, _ = both(torch.zeros(4, 1000, device=randoms.device), rows)
    for row, seed in enumerate(seeds):
        draw = Draw(seed, int(rows.output_positions[row]), 3)
        noise = gumbel_noise_at(draw, np.arange(1000))
        assert ours[row] == int(noise.argmax())


@pytest.mark.parametrize("count", [0, 1, 7])
def test_logprobs(randoms: Randoms, count: int) -> None:
    logits = (randoms(6, 300) * 4).round()  # with ties
    logits[1, 4:] = -torch.inf
    tokens = randoms.integers(0, 4, 6)
    chosen, ids, values = logprobs.token_logprobs(logits, tokens, count)
    wanted = logits.double().log_softmax(1)
    torch.testing.assert_close(
        chosen.double(), wanted.gather(1, tokens.unsqueeze(1)).squeeze(1), rtol=1e-5, atol=1e-5
    )
    order = logits.sort(dim=1, descending=True, stable=True).indices[:, :count]
    assert torch.equal(ids, order)
    torch.testing.assert_close(values.double(), wanted.gather(1, order), rtol=1e-5, atol=1e-5)
