"""The C++ attention: against the reference, and its bits across batches, chunks and threads."""

from __future__ import annotations

import pytest
import torch

from headgate.kernels import reference
from headgate.kernels.cpu import operations, set_num_threads
from tests.kernels.paged_rows import Chunk, Row, make_step

pytestmark = pytest.mark.usefixtures("cpu_kernels")

# Heads, key/value heads, head dim: the embedded model's, MHA, MQA, a group of many, odd dims.
SHAPES = [(9, 3, 64), (4, 4, 72), (3, 1, 128), (20, 2, 16), (4, 2, 30), (2, 1, 256), (5, 5, 8)]
# Window and soft cap.
KINDS = [(0, 0.0), (37, 0.0), (1, 0.0), (300, 4.0)]


def attend(
    chunks: list[Chunk], window: int = 0, cap: float = 0.0, seed: int = 0, block_size: int = 16
) -> list[torch.Tensor]:
    """Each chunk's result."""
    q, k_cache, v_cache, step = make_step(chunks, block_size, seed=seed)
    out = operations.paged_attention(q, k_cache, v_cache, step, 0.3, window, cap)
    return list(out.split([chunk.last - chunk.first for chunk in chunks]))


def rows(lengths: list[int], heads: int, kv_heads: int, dim: int) -> list[Row]:
    return [Row.random(length, heads, kv_heads, dim, seed) for seed, length in enumerate(lengths)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_ragged_rows_give_what_the_reference_gives(
    shape: tuple[int, int, int], kind: tuple[int, float]
) -> None:
    ends = [1, 16, 17, 64, 65, 300, 520, 90, 5]
    counts = [1, 1, 17, 1, 2, 3, 1, 70, 5]
    chunks = [
        Chunk(row, end - count, end)
        for row, end, count in zip(rows(ends, *shape), ends, counts, strict=True)
    ]
    for block_size in (16, 7):
        q, k_cache, v_cache, step = make_step(chunks, block_size)
        out = operations.paged_attention(q, k_cache, v_cache, step, 0.3, *kind)
        expected = reference.paged_attention(q, k_cache, v_cache, step, 0.3, *kind)
        torch.testing.assert_close(out, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 20])
def test_narrow_caches(dtype: torch.dtype, dim: int) -> None:
    one, other = rows([80] * 2, 6, 2, dim)
    chunks = [Chunk(one, 79, 80), Chunk(other, 50, 80)]
    q, k_cache, v_cache, step = make_step(chunks, 16, dtype)
    out = operations.paged_attention(q, k_cache, v_cache, step, 0.3, 0, 0.0)
    expected = reference.paged_attention(q, k_cache, v_cache, step, 0.3, 0, 0.0)
    torch.testing.assert_close(out, expected, rtol=2e-5, atol=2e-5)


def test_queries_may_be_a_view_with_strides() -> None:
    chunks = [Chunk(row, 30, 40) for row in rows([40] * 2, 6, 2, 16)]
    q, k_cache, v_cache, step = make_step(chunks, 16)
    fused = torch.full((len(q), 10, 20), torch.nan)
    fused[:, 1:7, 2:18] = q
    view = fused[:, 1:7, 2:18]
    assert torch.equal(
        operations.paged_attention(view, k_cache, v_cache, step, 0.3, 0, 0.0),
        operations.paged_attention(q, k_cache, v_cache, step, 0.3, 0, 0.0),
    )


def test_large_scores_neither_overflow_nor_vanish() -> None:
    row = rows([200], 2, 1, 16)[0]
    large = Row(row.q * 1e3, row.k * 1e3, row.v)
    (out,) = attend([Chunk(large, 0, 200)])
    q, k_cache, v_cache, step = make_step([Chunk(large, 0, 200)], 16)
    torch.testing.assert_close(
        out, reference.paged_attention(q, k_cache, v_cache, step, 0.3, 0, 0.0), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_bits_depend_on_nothing_but_the_sequence(
    shape: tuple[int, int, int], kind: tuple[int, float]
) -> None:
    """Whole, in chunks of 7, token by token; alone and among others; other blocks, other sizes."""
    length = 290  # past a partition's end
    row, *others = rows([length, 100, 33], *shape)
    (whole,) = attend([Chunk(row, 0, length)], *kind)
    for first in [*range(0, 70, 7), *range(245, 290, 7)]:
        last = min(first + 7, length)
        (alone,) = attend([Chunk(row, first, last)], *kind, seed=1, block_size=9)
        assert torch.equal(alone, whole[first:last])
    for position in (0, 15, 63, 64, 150, 255, 256, 257, 289):
        company = [Chunk(others[0], 40, 100), Chunk(others[1], 32, 33)]
        one = attend([company[0], Chunk(row, position, position + 1), company[1]], *kind, seed=2)
        assert torch.equal(one[1][0], whole[position])


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    lengths = [700, 1, 520, 300]
    chunks = [Chunk(row, len(row.q) - 1, len(row.q)) for row in rows(lengths, 6, 2, 64)]
    few, many = chunks[:1], [*chunks, Chunk(chunks[0].row, 100, 400)]
    set_num_threads(1)
    expected = attend(few), attend(many)
    for threads in (2, 5):  # a few rows' keys are then cut into parts, whose results are merged
        set_num_threads(threads)
        for _ in range(5):
            for got, want in zip((attend(few), attend(many)), expected, strict=True):
                assert all(map(torch.equal, got, want))


def test_rows_without_tokens_are_left_out() -> None:
    row, other = rows([40, 20], 4, 2, 16)
    got = attend([Chunk(other, 20, 20), Chunk(row, 30, 40), Chunk(other, 20, 20)])
    assert torch.equal(got[1], attend([Chunk(row, 30, 40)])[0])


def test_head_dims_above_256_are_left_to_the_reference() -> None:
    chunks = [Chunk(row, 9, 10) for row in rows([10], 2, 1, 264)]
    q, k_cache, v_cache, step = make_step(chunks, 16)
    assert torch.equal(
        operations.paged_attention(q, k_cache, v_cache, step, 0.3, 0, 0.0),
        reference.paged_attention(q, k_cache, v_cache, step, 0.3, 0, 0.0),
    )
