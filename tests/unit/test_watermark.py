"""The watermark: which tokens it favours, how a detector finds it, that others don't have it."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import torch

from headgate.shard.sampling.sampler import sample
from headgate.shard.sampling.watermark import favoured_tokens
from tests.unit.test_sampling import row, sampled_rows

VOCAB = 1000


def z_score(token_ids: list[int], gamma: float) -> float:
    """How far the count of favoured tokens is above chance, in standard deviations."""
    pairs = list(pairwise(token_ids))
    hits = sum(token in favoured_tokens(last, VOCAB, gamma) for last, token in pairs)
    expected = gamma * len(pairs)
    return (hits - expected) / math.sqrt(expected * (1 - gamma))


def generated(count: int, **sampling: float) -> list[int]:
    """Tokens of one row over flat random logits."""
    generator = torch.Generator().manual_seed(1)
    tokens = [7]
    for _ in range(count):
        logits = torch.randn(1, VOCAB, generator=generator)
        entry = row(tokens[:1], tokens[1:], **sampling)
        tokens.append(int(sample(logits, sampled_rows([entry]))[0]))
    return tokens


def test_the_list_depends_on_the_token_before_and_on_nothing_else() -> None:
    one = favoured_tokens(5, VOCAB, 0.25)
    assert len(one) == len(set(one.tolist())) == 250
    assert (one == favoured_tokens(5, VOCAB, 0.25)).all()
    assert set(one.tolist()) < set(favoured_tokens(5, VOCAB, 0.5).tolist())
    assert set(one.tolist()) != set(favoured_tokens(6, VOCAB, 0.25).tolist())


def test_the_list_is_that_of_the_published_scheme() -> None:
    generator = torch.Generator().manual_seed(15485863 * 42)
    green = torch.randperm(VOCAB, generator=generator)[: VOCAB // 2]
    assert favoured_tokens(42, VOCAB, 0.5).tolist() == green.tolist()


def test_a_detector_finds_it() -> None:
    for temperature in (0.0, 1.0):
        marked = generated(
            150, temperature=temperature, watermark_gamma=0.5, watermark_delta=2.0, seed=3
        )
        plain = generated(150, temperature=temperature, seed=3)
        assert z_score(marked, 0.5) > 6 > 3 > abs(z_score(plain, 0.5))


def test_other_rows_of_the_batch_are_as_without_it() -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(2))
    plain = [row([1], temperature=1.0, seed=seed) for seed in range(3)]
    marked = row([1], temperature=1.0, seed=1, watermark_gamma=0.1, watermark_delta=50.0)
    alone = sample(logits, sampled_rows(plain))
    mixed = sample(logits, sampled_rows([plain[0], marked, plain[2]]))
    assert (mixed[[0, 2]] == alone[[0, 2]]).all()
    assert mixed[1] in favoured_tokens(1, VOCAB, 0.1)
    assert np.array_equal(logits.numpy(), logits.clone().numpy())
