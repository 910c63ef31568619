"""Random numbers that depend on nothing but a row's seed, its output position and the token.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) with

    key     = seed, low word first
    counter = (token id // 4, output position, sample index, 0)

gives four words, one per token id. It holds no state: a recomputed, moved or resharded row draws
the same numbers. Here it is computed with NumPy; the C++ (cpu/sampling.h) draws the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

UIntArray = npt.NDArray[np.uint64]

_WORD = 0xFFFFFFFF
_MASK = np.uint64(_WORD)
_HALF = np.uint64(32)
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

# Noise lies within these: the words 0 and 2**32 - 1.
NOISE_MIN = -3.14
NOISE_MAX = 22.88


@dataclass(frozen=True, slots=True)
class Draw:
    """What a row's noise depends on."""

    seed: int  # 64 bits
    output_position: int
    sample_index: int


def philox4x32(
    counter: tuple[UIntArray, int, int, int], key: tuple[int, int]
) -> tuple[UIntArray, UIntArray, UIntArray, UIntArray]:
    """The four 32-bit output words, each an array like `counter[0]` (uint64 holding 32 bits)."""
    c0 = counter[0].copy()
    c1, c2, c3 = (np.full_like(c0, word) for word in counter[1:])
    k0, k1 = key
    product0, product1 = np.empty_like(c0), np.empty_like(c0)
    for _ in range(_ROUNDS):
        np.multiply(c0, _MULTIPLIERS[0], out=product0)
        np.multiply(c2, _MULTIPLIERS[1], out=product1)
        _mix(product1, c1, k0, out=c0)
        np.bitwise_and(product1, _MASK, out=c1)
        _mix(product0, c3, k1, out=c2)
        np.bitwise_and(product0, _MASK, out=c3)
        k0 = (k0 + _KEY_STEPS[0]) & _WORD
        k1 = (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def _mix(product: UIntArray, word: UIntArray, key: int, out: UIntArray) -> None:
    """out = high half of the product ^ word ^ key."""
    np.right_shift(product, _HALF, out=out)
    np.bitwise_xor(out, word, out=out)
    np.bitwise_xor(out, np.uint64(key), out=out)


def gumbel_noise_at(draw: Draw, token_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Standard Gumbel noise of some tokens at one place of a row's output. token_ids: ascending."""
    if not len(token_ids):
        return np.empty(0, np.float32)
    rest = (draw.output_position & _WORD, draw.sample_index & _WORD, 0)
    key = (draw.seed & _WORD, (draw.seed >> 32) & _WORD)
    num_groups = int(token_ids[-1]) // 4 + 1
    if len(token_ids) > num_groups:
        # Nearly all tokens: cheaper by whole groups than one by one, with the same outcome.
        words = philox4x32((np.arange(num_groups, dtype=np.uint64), *rest), key)
        return _gumbel(np.stack(words, axis=1).reshape(-1)[token_ids])
    groups, lanes = np.divmod(token_ids, 4)
    return _gumbel(np.choose(lanes, philox4x32((groups.astype(np.uint64), *rest), key)))


def _gumbel(words: UIntArray) -> npt.NDArray[np.float32]:
    """-log(-log(u)), u = (word + 0.5) / 2**32: never 0 nor 1, which float32 could not promise."""
    noise = words.astype(np.float64)
    noise += 0.5
    noise *= 2.0**-32
    for _ in range(2):
        np.log(noise, out=noise)
        np.negative(noise, out=noise)
    return noise.astype(np.float32)
