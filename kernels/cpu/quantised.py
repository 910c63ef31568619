"""QuantisedWeight: a quantised matrix in the layout that the C++ reads, made once at load."""

from __future__ import annotations

import torch

from headgate.kernels.cpu import library, weight_memory
from headgate.kernels.quantised import KINDS, quantise

# Kinds, by their names in quantised.h.
CODES = {"int8": 0, "int8-weight-only": 1, "int4": 2}

_PANEL = 32  # columns; kPanel in kernels.h
# Values quantised and packed at a time: the whole is never held twice.
_CHUNK = 1 << 22


class QuantisedWeight:
    """weight[N, K] quantised, N padded to whole panels and K to whole groups."""

    __slots__ = ("_memory", "address", "code", "columns", "inner", "kind", "nbytes")

    function = "hg_linear_quantised"

    def __init__(self, weight: torch.Tensor, kind: str) -> None:
        loaded = library.load()
        assert loaded is not None, "asked for without available()"
        self.columns, self.inner = weight.shape
        self.kind, self.code = KINDS[kind], CODES[kind]
        assert self.kind.group == loaded.hg_quantised_group(self.code)
        self.nbytes: int = loaded.hg_quantised_bytes(self.columns, self.inner, self.code)
        self._memory = weight_memory.allocate(self.nbytes)
        self.address = self._memory.data_ptr()
        at_once = max(1, _CHUNK // self.inner // _PANEL) * _PANEL
        for first in range(0, self.columns, at_once):
            part = quantise(weight[first : first + at_once], self.kind)
            loaded.hg_pack_quantised(
                part.values.data_ptr(),
                part.scales.data_ptr(),
                None if part.minima is None else part.minima.data_ptr(),
                part.shape[0],
                self.inner,
                self.code,
                self.address + loaded.hg_quantised_bytes(first, self.inner, self.code),
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the matrix it was made from."""
        return self.columns, self.inner
