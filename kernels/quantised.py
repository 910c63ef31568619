"""Quantised weights: how a matrix is quantised, and the reference's product.

A matrix [N, K] is cut along K into groups, each with a scale (and for int4 a minimum) of its own in
bfloat16; int8 has one scale for all groups of a channel, so that sums of groups are scaled by those
of the inputs alone. All groups of a channel of int4 have a unit in common: their scales are whole
numbers of it, their minima, none of which is above zero, of eight times the unit, all below 256. So
back ends may keep them in a byte each, and sum up the groups that share a scale of the inputs as a
whole number. Values are chosen for the scales as they are stored, so rounding those costs little.
Inputs of the kinds that multiply integers are quantised row by row and group by group when they
come, to -127..127 by the group's largest; so a row's result depends on that row alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from headgate.quant_kinds import QuantKind

# Values quantised at a time: temporary copies stay small, and in the cache.
_CHUNK = 1 << 18
_GPU_CHUNK = 1 << 24  # whose temporary copies are never in a cache
# Inputs all below this are zero: the reciprocal of their scale would not be finite.
_SMALLEST_INPUT = 1e-30
# int4: the ranges to start from, as parts of the whole one, and how often values are chosen from
# each; between two choices scale and minimum are fitted.
_RANGES = (1.0, 0.85)
_FITS = 2
_LEAST_SPREAD = 1e-30
_MOST_UNITS = 255  # of int4's scales and minima
_UNITS_OF_MINIMUM = 8  # of scales in one of minima: around zero a minimum is some 7.5 scales


@dataclass(frozen=True, slots=True, eq=False)
class QuantisedTensor:
    """A matrix [N, K] as the reference holds it; G groups of S values, the last one filled up."""

    kind: QuantKind
    inner: int  # K
    values: torch.Tensor  # int8[N, G, S]
    scales: torch.Tensor  # bfloat16[N, G]; per channel: [N, 1]
    minima: torch.Tensor | None  # the same; int4 only

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.inner

    @property
    def nbytes(self) -> int:
        parts = (self.values, self.scales, self.minima)
        return sum(part.nbytes for part in parts if part is not None)

    def dequantise(self) -> torch.Tensor:
        """float32[N, K]: the weights that products are taken with."""
        weight = self.values.float() * self.scales.float().unsqueeze(-1)
        if self.minima is not None:
            weight += self.minima.float().unsqueeze(-1)
        return weight.flatten(1)[:, : self.inner]


def quantise(weight: torch.Tensor, kind: QuantKind) -> QuantisedTensor:
    """weight[N, K] of any floating dtype, each group by itself."""
    columns, inner = weight.shape
    groups = kind.padded(inner) // kind.group
    values = weight.new_empty((columns, groups, kind.group), dtype=torch.int8)
    scaled = 1 if kind.per_channel else groups  # parts of a row with a scale each
    scales = weight.new_empty((columns, scaled), dtype=torch.bfloat16)
    minima = torch.empty_like(scales) if kind.offset else None
    chunk = _GPU_CHUNK if weight.is_cuda else _CHUNK
    at_once = max(1, chunk // kind.padded(inner))
    for first in range(0, columns, at_once):
        part = slice(first, first + at_once)
        # Filled up with the last value, which changes no range; the inputs there are zeros.
        wide = F.pad(weight[part].float(), (0, groups * kind.group - inner), mode="replicate")
        # One group a column: sums over groups are then sums of rows.
        by_group = wide.view(-1, groups // scaled * kind.group).T.contiguous()
        fitted = _fit_offset(by_group, groups) if kind.offset else _fit_symmetric(by_group)
        found, scale, minimum = fitted
        values[part] = found.T.reshape(-1, groups, kind.group)
        scales[part] = scale.view(-1, scaled)
        if minima is not None and minimum is not None:
            minima[part] = minimum.view(-1, scaled)
    return QuantisedTensor(kind, inner, values, scales, minima)


def _fit_symmetric(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
    """Values, scales of the groups x[:, M], by their largest."""
    scale = _stored(x.abs().amax(0) / 127)
    scale = torch.where(scale > 0, scale, 1.0)
    return (x / scale).round_().clamp_(-127, 127), scale, None


def _fit_offset(x: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values, scales and minima of the groups x[:, M], `groups` of a channel side by side, with the
    least squared error found.

    From the whole range, and from a narrower one that cuts outliers off, the line through the
    values is fitted to x by linear regression and the values are chosen again.
    """
    low, high, mean = x.amin(0).clamp(max=0), x.amax(0), _sum(x) / len(x)
    # The widest scale and the lowest minimum must both be whole numbers of 8 bits.
    needed = torch.maximum((high - low) * (1 / 15), low / -_UNITS_OF_MINIMUM)
    scale_unit = _unit(needed, groups)
    minimum_unit = scale_unit * -_UNITS_OF_MINIMUM
    best: tuple[torch.Tensor, ...] = ()
    for part in _RANGES:
        scale = (high - low) * (part / 15)
        minimum = (low + high) / 2 - 7.5 * scale
        for fit in range(_FITS):
            scale = _in_units(scale, scale_unit, 1)
            minimum = _in_units(minimum, minimum_unit, 0)
            values = ((x - minimum) / scale).round_().clamp_(0, 15)
            error = _sum((values * scale + minimum - x).square_())
            found = (error, values, scale, minimum)
            if best:
                better = error < best[0]
                best = tuple(torch.where(better, a, b) for a, b in zip(found, best, strict=True))
            else:
                best = found
            if fit + 1 < _FITS:
                scale, minimum = _fit_line(x, values, mean)
    return best[1], best[2], best[3]


def _unit(largest: torch.Tensor, groups: int) -> torch.Tensor:
    """The power of two of which the largest of each channel's groups is a number of 8 bits, for
    each group."""
    of_channel = largest.view(-1, groups).amax(1).contiguous()
    power = (of_channel.view(torch.int32) & 0x7F800000).view(torch.float32)
    return (torch.where(power > 0, power, 1.0) / 128).repeat_interleave(groups)


def _in_units(x: torch.Tensor, unit: torch.Tensor, least: int) -> torch.Tensor:
    """Rounded as int4's scales and minima are kept."""
    return (x / unit).round_().clamp_(least, _MOST_UNITS) * unit


def _fit_line(
    x: torch.Tensor, values: torch.Tensor, mean: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and minimum of the line through `values` that is nearest to x, whose mean is given."""
    middle = _sum(values) / len(x)
    spread = _sum((values - middle).square_()).clamp_(min=_LEAST_SPREAD)
    scale = _sum(values * (x - mean)) / spread
    return scale, mean - scale * middle


def _sum(x: torch.Tensor) -> torch.Tensor:
    """Over the first dimension, one after the other: in the order in which the C++ adds."""
    total = x[0].clone()
    for row in x[1:]:
        total += row
    return total


def _stored(x: torch.Tensor) -> torch.Tensor:
    """Rounded as scales of 8 bits are kept."""
    return x.bfloat16().float()


def quantise_inputs(x: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x[.., K] float32 as values[.., G, S], whole numbers from -127 to 127, and scales[.., G].

    S is `group`. Every back end gets the same bits.
    """
    padded = F.pad(x, (0, -x.shape[-1] % group)).unflatten(-1, (-1, group))
    largest = padded.abs().amax(-1)
    largest = torch.where(largest < _SMALLEST_INPUT, 0.0, largest)
    # Torch divides a number by a tensor as a product with the reciprocal, which rounds twice.
    inverse = torch.where(largest == 0, 0.0, torch.full_like(largest, 127.0) / largest)
    return (padded * inverse.unsqueeze(-1)).round(), largest / 127.0


def linear(x: torch.Tensor, weight: QuantisedTensor) -> torch.Tensor:
    """x[T, K] times the transpose of weight, in float32, ascending groups: [T, N]."""
    if not weight.kind.inputs:
        return F.linear(x.float(), weight.dequantise()).to(x.dtype)
    values, input_scales = quantise_inputs(x.float(), weight.kind.inputs)
    out = values.new_zeros((x.shape[0], weight.shape[0]))
    for g in range(values.shape[1]):
        if weight.kind.per_channel:
            # Sums of whole numbers below 2^24: exact in float32, in any order.
            sums = values[:, g] @ weight.values[:, g].float().T
        else:
            sums = _sums_of_groups(values[:, g], weight, g)
        out += sums * input_scales[:, g, None]
    if weight.kind.per_channel:
        out *= weight.scales[:, 0].float()
    return out.to(x.dtype)


def _sums_of_groups(values: torch.Tensor, weight: QuantisedTensor, place: int) -> torch.Tensor:
    """Products of values[T, S] with the groups of int4 weights that meet the inputs' group at
    `place`. They are whole numbers of each channel's unit, and rounded once, to float32."""
    assert weight.minima is not None
    size = weight.kind.group
    total = values.new_zeros((), dtype=torch.float64)
    for i, part in enumerate(values.split(size, -1)):
        group = place * (values.shape[-1] // size) + i
        sums = part @ weight.values[:, group].float().T
        total = total + sums.double() * weight.scales[:, group].double()
        total = total + part.sum(-1, keepdim=True).double() * weight.minima[:, group].double()
    return total.float()
