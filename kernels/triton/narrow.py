"""What the kernels share that store numbers in fewer bits: cut to a range, or by a scale.

Whole numbers and scales are those of `headgate.kernels.quantised.quantise_inputs`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from headgate.kernels.int8_cache import Int8Cache, PagedCache

_SMALLEST = tl.constexpr(1e-30)  # as in headgate.kernels.quantised
# Added and taken away again: a number is rounded to the nearest whole one, halves to even.
_ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23


def limit_of(cache: PagedCache) -> float:
    """What is cut before it is stored in `cache`, to this and its negative; 0: nothing is."""
    if isinstance(cache, Int8Cache) or cache.dtype in (torch.float32, torch.bfloat16):
        return 0.0
    return float(torch.finfo(cache.dtype).max)


def parts_of(cache: PagedCache) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, scales) for a kernel's arguments; where there are no scales, the values again."""
    return (cache.values, cache.scales) if isinstance(cache, Int8Cache) else (cache, cache)


@triton.jit
def narrowed(x, LIMIT: tl.constexpr, dtype: tl.constexpr):
    """x in the cache's dtype. NaN stays NaN."""
    if LIMIT > 0:
        x = tl.clamp(x.to(tl.float32), -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    return x.to(dtype)


@triton.jit
def largest_of(x):
    """Of each row's magnitudes, NaN where there is one: its bits are above every number's."""
    bits = x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(bits, 1).to(tl.float32, bitcast=True)


@triton.jit
def scale_of(largest):
    """(scale, 1 / scale) of rows with these largest magnitudes."""
    largest = tl.where(largest < _SMALLEST, 0.0, largest)
    zero = largest == 0.0
    inverse = tl.where(zero, 0.0, tl.div_rn(127.0, tl.where(zero, 1.0, largest)))
    return tl.div_rn(largest, 127.0), inverse


@triton.jit
def quantised(x, inverse):
    """Rows of x as int8, by what scale_of found."""
    scaled = x.to(tl.float32) * inverse[:, None]
    return ((scaled + _ROUNDER) - _ROUNDER).to(tl.int8)
