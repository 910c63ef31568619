"""LastTokens: what the last step sampled, on the device, where the next step finds it.

The host plans a step ahead, so it does not know these tokens yet. Among a step's ids, `code(i)`, a
number below zero, stands for the i-th of them.
"""

from __future__ import annotations

import numpy as np
import torch

from headgate.shard.device import Device
from headgate.shard.sampling.params import IntArray


class LastTokens:
    """At an address that stays."""

    def __init__(self, device: Device, most: int) -> None:
        """`most`: tokens that a step may sample."""
        self._values = device.zeros(most, dtype=torch.int64)

    def keep(self, tokens: torch.Tensor) -> None:
        """tokens: int64[S], of the step that ends here; below zero where there is none."""
        self._values[: len(tokens)].copy_(tokens)

    def resolve(self, ids: torch.Tensor) -> torch.Tensor:
        """`ids`, int64 or int32 of any shape, with tokens in place of codes. No synchronisation."""
        places = (-1 - ids).clamp_min(0).long()
        tokens = self._values.take(places).clamp_min(0).to(ids.dtype)
        return torch.where(ids < 0, tokens, ids)


def codes(count: int) -> IntArray:
    """What stands for the tokens of a step that samples `count`: int64[count], all below zero."""
    return -1 - np.arange(count)
