"""PackedQuantised: a quantised weight in the order in which the kernels read it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from headgate.kernels.quantised import QuantisedTensor
from headgate.quant_kinds import QuantKind


@dataclass(frozen=True, slots=True, eq=False)
class PackedQuantised:
    """Blocks along K of S bytes a column, one column after the other: a tile's part of a block is
    one piece of memory.

    Per channel: values int8[groups, N, S], scales bfloat16[N]. Otherwise groups go in pairs, and
    two numbers of 16 bits in a word of 32, which is the least that is copied ahead of its use: in
    8 bits values int8[groups, N, S], and scales int32[groups / 2, N] of the two groups; in 4 bits
    values uint8[groups / 2, N, S], the first group in the low halves of the bytes, and scales
    int32[groups, N], with minima in the high halves of the words.
    """

    kind: QuantKind
    inner: int  # K
    values: torch.Tensor
    scales: torch.Tensor

    @classmethod
    def of(cls, weight: QuantisedTensor) -> PackedQuantised:
        values, scales, minima = weight.values.transpose(0, 1), weight.scales.T, weight.minima
        if weight.kind.per_channel:
            return cls(weight.kind, weight.inner, values.contiguous(), scales[0].contiguous())
        odd = len(values) % 2  # filled up with a group of zeros, whose inputs are zeros too
        values = F.pad(values, (0, 0, 0, 0, 0, odd))
        scales = F.pad(scales, (0, 0, 0, odd))
        if minima is None:
            words = torch.stack(scales.unflatten(0, (-1, 2)).unbind(1), 2)
        else:
            low, high = values.to(torch.uint8).unflatten(0, (-1, 2)).unbind(1)
            values = low | high << 4
            words = torch.stack((scales, F.pad(minima.T, (0, 0, 0, odd))), 2)
        words = words.contiguous().view(torch.int32).squeeze(2)
        return cls(weight.kind, weight.inner, values.contiguous(), words)

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[1], self.inner

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes
