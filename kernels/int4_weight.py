"""A 4-bit matrix in the layout of a GPTQ or AWQ checkpoint, as operations take it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

# In which order an AWQ word holds its eight columns, from the low bits up.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_BITS = 4
_VALUES = 8  # in a word


@dataclass(frozen=True, slots=True, eq=False)
class Int4Weight:
    """A matrix N x K in groups of G along K, scale * (value - zero), eight values to an int32.

    gptq (Frantar et al., 2022): weight int32[K / 8, N], eight k's a word, and zeros
        int32[K / G, N / 8], stored less `zero_offset`; `g_idx` names the group of each k.
    awq (Lin et al., 2023): weight int32[K, N / 8] and zeros int32[K / G, N / 8], eight columns a
        word, in AWQ_ORDER.
    """

    layout: Literal["gptq", "awq"]
    weight: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor  # [K / G, N]
    group: int  # G
    zero_offset: int = 0  # 1 for GPTQ's first format
    g_idx: torch.Tensor | None = None  # int32[K]; None: k / G

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        ks = _VALUES if self.layout == "gptq" else 1
        return self.scales.shape[1], self.weight.shape[0] * ks

    def dequantise(self) -> torch.Tensor:
        """float32[N, K]."""
        inner = self.shape[1]
        zeros = _unpack(self.zeros, self._order) + self.zero_offset
        if self.layout == "gptq":
            values = _unpack(self.weight.T, range(_VALUES)).T
        else:
            values = _unpack(self.weight, self._order)
        groups = self.g_idx
        if groups is None:
            groups = torch.arange(inner, device=values.device) // self.group
        groups = groups.long()
        return ((values - zeros[groups]).float() * self.scales.float()[groups]).T

    @property
    def _order(self) -> tuple[int, ...]:
        return AWQ_ORDER if self.layout == "awq" else tuple(range(_VALUES))


def _unpack(words: torch.Tensor, order: range | tuple[int, ...]) -> torch.Tensor:
    """int32[.., W] as int32[.., 8 W]; the value at bits 4 i of a word is its column order[i]."""
    shifts = torch.tensor([_BITS * order.index(column) for column in range(_VALUES)])
    values = words.unsqueeze(-1) >> shifts.to(words.device, words.dtype) & 15
    return values.flatten(-2)
