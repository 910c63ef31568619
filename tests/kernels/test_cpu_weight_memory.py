"""Weights' memory: aligned, in mappings that last as long as what was cut from them."""

from __future__ import annotations

import gc

import pytest
import torch

from headgate.kernels import huge_pages
from headgate.kernels.cpu import weight_memory


def test_pieces_are_aligned_keep_apart_and_outlive_their_mapping(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(weight_memory, "_MAPPING", 1 << 16)
    monkeypatch.setattr(weight_memory, "_mapping", weight_memory._Mapping())
    sizes = [1, 0, 64, 65, 40000, 30000, 200000, 7]  # new mappings at 30000 and 200000
    pieces = [weight_memory.allocate(size) for size in sizes]
    assert not any(piece.any() for piece in pieces)
    for number, piece in enumerate(pieces):
        piece.fill_(number + 1)
    weight_memory._mapping = weight_memory._Mapping()
    gc.collect()
    for number, (size, piece) in enumerate(zip(sizes, pieces, strict=True)):
        assert piece.shape == (size,) and piece.dtype == torch.uint8
        assert piece.data_ptr() % 64 == 0
        assert (piece == number + 1).all()


def test_a_system_without_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(huge_pages.mmap, "MADV_HUGEPAGE", raising=False)
    assert len(huge_pages.map_zeros(5000)) == 5000
