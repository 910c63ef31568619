"""Philox4x32-10 against Random123's published vectors, and the noise made of it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headgate.kernels.philox import (
    NOISE_MAX,
    NOISE_MIN,
    Draw,
    _gumbel,
    gumbel_noise_at,
    philox4x32,
)

ONES = 0xFFFFFFFF


def gumbel_noise(seed: int, position: int, sample_index: int, vocab_size: int) -> np.ndarray:
    """Of all tokens."""
    return gumbel_noise_at(Draw(seed, position, sample_index), np.arange(vocab_size))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        (
            (0, 0, 0, 0),
            (0, 0),
            (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        ),
        (
            (ONES, ONES, ONES, ONES),
            (ONES, ONES),
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    first, *others = counter
    words = philox4x32((np.array([first], np.uint64), *others), key)
    assert tuple(int(word[0]) for word in words) == expected


def test_counter_and_key_are_laid_out_as_documented() -> None:
    seed, position, sample_index, token = 0x0123456789ABCDEF, 7, 3, 4 * 11 + 2
    words = philox4x32(
        (np.array([11], np.uint64), position, sample_index, 0), (0x89ABCDEF, 0x01234567)
    )
    noise = gumbel_noise(seed, position, sample_index, 64)[token]
    uniform = (float(words[2][0]) + 0.5) / 2**32
    assert noise == np.float32(-np.log(-np.log(uniform)))


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    position=st.integers(0, 10**6),
    sample_index=st.integers(0, 1000),
    vocab_size=st.integers(1, 300),
    data=st.data(),
)
def test_sparse_noise_is_a_part_of_dense_noise(
    seed: int, position: int, sample_index: int, vocab_size: int, data: st.DataObject
) -> None:
    ids = np.array(sorted(data.draw(st.sets(st.integers(0, vocab_size - 1)))), np.int64)
    dense = gumbel_noise(seed, position, sample_index, vocab_size)
    assert dense.shape == (vocab_size,)
    assert np.array_equal(gumbel_noise_at(Draw(seed, position, sample_index), ids), dense[ids])


def test_noise_stays_within_its_bounds() -> None:
    extremes = _gumbel(np.array([0, ONES], np.uint64))
    assert np.isfinite(extremes).all()
    assert NOISE_MIN < extremes[0] < extremes[1] < NOISE_MAX


def test_noise_is_gumbel_distributed() -> None:
    noise = gumbel_noise(42, 0, 0, 100_000).astype(np.float64)
    assert noise.mean() == pytest.approx(np.euler_gamma, abs=0.02)
    assert noise.std() == pytest.approx(np.pi / np.sqrt(6), abs=0.02)


def test_every_part_of_the_counter_matters() -> None:
    base = gumbel_noise(1, 2, 3, 32)
    others = [(2, 2, 3), (1 + 2**32, 2, 3), (1, 3, 3), (1, 2, 4)]
    for other in others:
        assert not np.isin(gumbel_noise(*other, 32), base).any()
