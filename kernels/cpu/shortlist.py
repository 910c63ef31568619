"""Shortlist: what finds a row's largest product with a vocabulary without all of them being exact.

Where nothing but a row's likeliest token is asked for, int8 weights say roughly what its logits
are, and a bound on how wrong they are leaves a few columns whose exact logits decide
(kernels/cpu/shortlist.h has the arithmetic). That reads half of the bytes, and multiplies at
up to four times the rate, for the same token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from headgate.kernels.cpu import library
from headgate.kernels.cpu.calls import allocate, call
from headgate.kernels.cpu.packed import PackedWeight
from headgate.kernels.cpu.quantised import QuantisedWeight
from headgate.kernels.cpu.rows import is_rows

if TYPE_CHECKING:
    from headgate.kernels.ops import Ranks


class Shortlist:
    """Of a vocabulary's bfloat16 weights `table`[N, K], which it refers to."""

    __slots__ = ("_lengths", "_table", "approximate", "nbytes")

    def __init__(self, table: torch.Tensor) -> None:
        loaded = library.load()
        assert loaded is not None, "asked for without available()"
        assert table.dtype == torch.bfloat16 and table.is_contiguous()
        self._table = table
        self.approximate = QuantisedWeight(table, "int8")
        columns, inner = table.shape
        self._lengths = torch.empty(loaded.hg_column_lengths_size(columns))
        self.nbytes: int = self.approximate.nbytes + self._lengths.nbytes
        approximate, lengths = self.approximate.address, self._lengths.data_ptr()
        loaded.hg_column_lengths(table.data_ptr(), columns, inner, approximate, lengths)

    @property
    def table_address(self) -> int:
        return self._table.data_ptr()

    @property
    def lengths_address(self) -> int:
        """Of what hg_column_lengths wrote."""
        return self._lengths.data_ptr()


def make_shortlist(table: torch.Tensor, weight: object) -> Shortlist | None:
    """As in ops."""
    loaded = library.load()
    assert loaded is not None, "asked for without available()"
    packed = isinstance(weight, PackedWeight) and weight.dtype == torch.bfloat16
    if not packed or table.dtype != torch.bfloat16 or not loaded.hg_multiplies_bytes():
        return None
    return Shortlist(table)


def linear_largest(
    x: torch.Tensor, weight: PackedWeight, shortlist: Shortlist, largest: int, ranks: Ranks
) -> torch.Tensor:
    """As in ops. Raises ValueError."""
    if not is_rows(x) or x.dim() != 2 or x.shape[1] != weight.inner:
        raise ValueError(
            f"linear_largest takes float32 [R, {weight.inner}], not {x.dtype} {tuple(x.shape)}"
        )
    rows = x.data_ptr(), x.shape[0], weight.inner, x.stride(0)
    out, known = allocate((x.shape[0], weight.columns)), allocate((x.shape[0], ranks.world_size))
    products = weight.columns, out.data_ptr(), weight.columns, largest, shortlist.table_address
    call(
        "hg_linear_likely",
        *rows,
        weight.address,
        weight.code,
        *products,
        shortlist.approximate.address,
        known.data_ptr(),
        ranks.rank,
        ranks.world_size,
    )
    known = ranks.all_reduce(known)
    call(
        "hg_linear_largest",
        *rows,
        weight.code,
        *products,
        shortlist.lengths_address,
        known.data_ptr(),
        ranks.world_size,
    )
    return out
