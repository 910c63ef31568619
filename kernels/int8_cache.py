"""Int8Cache: keys or values in 8 bits, with a scale for every position and head.

The numbers of one token and head are stored by their own largest, and by nothing else: what is
stored has the same bits in any batch, in any chunk of a prompt, in any block, and after a restart.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from headgate.kernels.quantised import quantise_inputs

SCALE_BYTES = 4  # for each position and head


@dataclass(frozen=True, slots=True, eq=False)
class Int8Cache:
    """The keys, or the values, of one layer: scale * value."""

    values: torch.Tensor  # int8[blocks, block_size, K, D], from -127 to 127
    # float32[blocks, K, block_size]: whoever reads a head finds its scales side by side.
    scales: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def is_contiguous(self) -> bool:
        return self.values.is_contiguous() and self.scales.is_contiguous()

    def store(self, x: torch.Tensor, slots: torch.Tensor) -> None:
        """Quantises x[T, K, D] into `slots`[T], by scales of the largest / 127 (quantise_inputs).

        All of a head with an infinity or a NaN in it reads as NaN.
        """
        values, scales = quantise_inputs(x.float(), x.shape[-1])  # one group
        block_size = self.shape[1]
        self.values.flatten(0, 1)[slots] = values.squeeze(-2).to(torch.int8)
        self.scales[slots // block_size, :, slots % block_size] = scales.squeeze(-1)

    def __getitem__(self, blocks: torch.Tensor | slice) -> torch.Tensor:
        """Some blocks as they are read: float32[.., block_size, K, D]."""
        return self.values[blocks] * self.scales[blocks].transpose(-1, -2).unsqueeze(-1)


# A layer's keys or values; a tensor is [blocks, block_size, K, D] of a floating dtype.
PagedCache = torch.Tensor | Int8Cache
