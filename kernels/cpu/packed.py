"""PackedWeight: a matrix in the layout that the C++ linear reads, made once at load."""

from __future__ import annotations

import torch

from headgate.kernels.cpu import library, weight_memory

# dtypes of weights and caches, by their names in kernels.h.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# What hg_linear is told instead where inputs are rounded to bfloat16, as bfloat16 weights are.
_ROUNDED = 3


class PackedWeight:
    """weight[N, K] held in `dtype`, N padded to whole panels. Arithmetic with it is float32, with
    inputs as they are or, at precision "medium" and for bfloat16 only, rounded to bfloat16."""

    __slots__ = ("_memory", "address", "code", "columns", "dtype", "inner", "nbytes")

    function = "hg_linear"
    gated_mlp = "hg_gated_mlp"

    def __init__(
        self, weight: torch.Tensor, dtype: torch.dtype, precision: str = "highest"
    ) -> None:
        loaded = library.load()
        assert loaded is not None, "asked for without available()"
        self.columns, self.inner = weight.shape
        code = DTYPES[dtype]
        assert precision == "highest" or dtype == torch.bfloat16
        self.dtype, self.code = dtype, _ROUNDED if precision == "medium" else code
        self.nbytes: int = loaded.hg_packed_bytes(self.columns, self.inner, code)
        self._memory = weight_memory.allocate(self.nbytes)
        self.address = self._memory.data_ptr()
        source = weight.to(dtype).contiguous()
        loaded.hg_pack_weight(source.data_ptr(), self.columns, self.inner, code, self.address)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the matrix it was made from."""
        return self.columns, self.inner
