"""Likeliest tokens and the Gumbel-max rule in C++: the reference's for any vocabulary."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from headgate.kernels import ops, reference
from headgate.kernels.cpu import operations, set_num_threads
from headgate.kernels.philox import Draw, gumbel_noise_at
from tests.kernels.ranks import of_ranks

pytestmark = pytest.mark.usefixtures("cpu_kernels")


def scores_of(vocab_size: int, seed: int, spread: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(vocab_size) * spread).astype(np.float32)


def rows_of_scores(size: int) -> np.ndarray:
    """40, with ties, the last of a row, infinities and what is not a number among them."""
    generator = np.random.default_rng(size)
    scores = generator.integers(-9, 9, (40, size)).astype(np.float32)
    scores[20:] = generator.standard_normal((20, size))
    scores[1, -1] = scores[21, -1] = 100.0
    for row, value in ((2, np.nan), (3, np.inf), (4, -np.inf), (5, -0.0)):
        scores[row, generator.integers(size)] = scores[row, -1] = value
    scores[6], scores[7], scores[8] = -np.inf, np.nan, -0.0
    return scores


@pytest.mark.parametrize("size", [1, 15, 64, 259, 2049, 49_152])
def test_the_likeliest_is_the_references(size: int) -> None:
    scores = rows_of_scores(size)
    for count in (1, 40):
        rows = torch.from_numpy(scores[:count])
        assert np.array_equal(operations.argmax(rows), reference.argmax(rows))
    if size > 1:
        assert np.array_equal(operations.argmax(rows[:, :-1]), reference.argmax(rows[:, :-1]))


@pytest.mark.parametrize("cuts", [(), (500,), (1, 7, 2048)])
def test_ranks_choose_what_all_scores_have(cuts: tuple[int, ...]) -> None:
    scores = torch.from_numpy(rows_of_scores(2049))
    scores[9:12, 3] = scores[9:12, 1000] = 20.0  # of two ranks' equals the first
    parts, firsts = scores.tensor_split(cuts, 1), (0, *cuts)

    def choose(rank: int, ranks: ops.Ranks) -> torch.Tensor:
        return operations.likeliest_tokens(parts[rank].contiguous(), firsts[rank], 1, ranks)

    for tokens in of_ranks(len(parts), choose):
        assert np.array_equal(tokens.numpy(), reference.argmax(scores))


@pytest.mark.parametrize("vocab_size", [1, 5, 259, 2048, 2049, 10_000, 49_152])
def test_tokens_are_the_references(vocab_size: int) -> None:
    for seed in range(12):
        scores = scores_of(vocab_size, seed, spread=(0.0, 1.0, 8.0)[seed % 3])
        draw = Draw(2**63 + seed * 977, output_position=seed * 5, sample_index=seed % 3)
        for temperature in (1.0, 0.3, 5.0, 1e-6):
            arguments = (scores, float(scores.max()), temperature, draw)
            expected = reference.gumbel_argmax(*arguments)
            for threads in (1, 3):
                set_num_threads(threads)
                assert operations.gumbel_argmax(*arguments) == expected


def test_the_noise_is_the_references() -> None:
    """Token by token: all others are out of reach, or tie with it but for the noise."""
    draw = Draw(77, 3, 1)
    noise = gumbel_noise_at(draw, np.arange(3000))
    order = np.argsort(-noise)
    scores = np.zeros(3000, np.float32)
    for token in order[:200]:
        assert operations.gumbel_argmax(scores, 0.0, 1.0, draw) == token
        scores[token] = -np.inf
    near = np.full(3000, -np.inf, np.float32)
    for one, other in zip(order[200:300], order[2000:2100], strict=True):
        difference = noise[one] - noise[other]
        near[[one, other]] = 0.0, difference * np.float32(1 - 1e-5)
        assert operations.gumbel_argmax(near, float(near.max()), 1.0, draw) == one
        near[other] = difference * np.float32(1 + 1e-5)
        assert operations.gumbel_argmax(near, float(near.max()), 1.0, draw) == other
        near[[one, other]] = -np.inf


def test_scores_that_are_not_numbers_never_win() -> None:
    scores = scores_of(5000, 1)
    scores[::2] = -np.inf
    scores[1::4] = np.nan
    draw = Draw(5, 0, 0)
    arguments = (scores, float(np.nanmax(scores)), 1.0, draw)
    token = operations.gumbel_argmax(*arguments)
    assert np.isfinite(scores[token])
    assert token == reference.gumbel_argmax(*arguments)
