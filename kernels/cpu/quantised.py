"""QuantisedWeight: a quantised matrix in the layout that the C++ reads, made once at load."""

from __future__ import annotations

import torch

from headgate.kernels.cpu import library, weight_memory
from headgate.kernels.cpu.packed import DTYPES
from headgate.quant_kinds import KINDS

# Kinds, by their names in quantised.h.
CODES = {"int8": 0, "int8-weight-only": 1, "int4": 2}


class QuantisedWeight:
    """weight[N, K] quantised as headgate.kernels.quantised does, N padded to whole panels and K to
    whole groups."""

    __slots__ = ("_memory", "address", "code", "columns", "inner", "kind", "nbytes")

    function = "hg_linear_quantised"
    gated_mlp = "hg_gated_mlp_quantised"

    def __init__(self, weight: torch.Tensor, kind: str) -> None:
        loaded = library.load()
        assert loaded is not None, "asked for without available()"
        self.columns, self.inner = weight.shape
        self.kind, self.code = KINDS[kind], CODES[kind]
        assert self.kind.padded(1) == loaded.hg_quantised_block(self.code)
        self.nbytes: int = loaded.hg_quantised_bytes(self.columns, self.inner, self.code)
        self._memory = weight_memory.allocate(self.nbytes)
        self.address = self._memory.data_ptr()
        source = (weight if weight.dtype in DTYPES else weight.float()).contiguous()
        loaded.hg_quantise_weight(
            source.data_ptr(),
            DTYPES[source.dtype],
            self.columns,
            self.inner,
            self.code,
            self.address,
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the matrix it was made from."""
        return self.columns, self.inner
