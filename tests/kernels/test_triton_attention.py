"""The Triton attention: against the reference, and its bits across batches, chunks and splits."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

pytest.importorskip("triton")

from headgate.kernels import reference
from headgate.kernels.int8_cache import Int8Cache, PagedCache
from headgate.kernels.triton import paged_attention as module
from tests.kernels.paged_rows import Chunk, Row, make_step, widened
from tests.kernels.randoms import DTYPES, Randoms, assert_near

# Heads, key/value heads, head dim: the embedded model's, MHA, MQA, groups that don't divide a tile.
SHAPES = [(9, 3, 64), (4, 4, 72), (7, 1, 128), (20, 2, 32), (4, 2, 80), (2, 1, 256), (5, 5, 96)]
# Window, soft cap, ALiBi.
KINDS = [(0, 0.0, False), (37, 0.0, False), (1, 0.0, False), (70, 4.0, False), (0, 0.0, True)]
ENDS = [1, 16, 17, 64, 65, 150, 90, 5, 33]
COUNTS = [1, 1, 17, 1, 2, 3, 70, 5, 0]


@pytest.fixture(autouse=True)
def small_partitions(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that short rows have several."""
    monkeypatch.setattr(module, "PARTITION", 64)


def random_rows(randoms: Randoms, lengths: list[int], shape: tuple[int, int, int]) -> list[Row]:
    heads, kv_heads, dim = shape
    return [Row.random(length, heads, kv_heads, dim, randoms.seed + length) for length in lengths]


def attend(
    device: str,
    chunks: list[Chunk],
    kind: tuple[int, float, bool] = (0, 0.0, False),
    block_size: int = 16,
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
) -> tuple[torch.Tensor, torch.Tensor]:
    """(Triton's result, the reference's in float32)."""
    window, cap, alibi = kind
    q, k_cache, v_cache, step = make_step(chunks, block_size, dtypes[1], seed=len(chunks))
    q = q.to(device, dtypes[0])
    k_cache, v_cache = on(device, k_cache), on(device, v_cache)
    step = replace(
        step,
        **{
            name: getattr(step, name).to(device)
            for name in ("cu_query_lens", "context_lens", "block_tables", "slot_mapping")
        },
    )
    slopes = None
    if alibi:
        slopes = torch.tensor([2.0 ** -(1 + head % 8) for head in range(q.shape[1])]).to(device)
    call = (step, 0.3, window, cap, slopes)
    out = module.paged_attention(q, k_cache, v_cache, *call)
    return out, reference.paged_attention(q.float(), widened(k_cache), widened(v_cache), *call)


def on(device: str, cache: PagedCache) -> PagedCache:
    if isinstance(cache, Int8Cache):
        return Int8Cache(cache.values.to(device), cache.scales.to(device))
    return cache.to(device)


@pytest.mark.parametrize(
    ("shape", "kind", "kept"),
    [
        ((9, 3, 24), KINDS[0], torch.float32),
        ((5, 1, 32), KINDS[3], torch.int8),
        ((6, 2, 16), KINDS[4], torch.float32),
        ((6, 2, 20), KINDS[0], torch.int8),
    ]
    + [
        pytest.param(*case, marks=pytest.mark.exhaustive)
        for case in product(SHAPES, KINDS, (torch.float32, torch.int8))
    ],
    ids=str,
)
def test_ragged_rows_give_what_the_reference_gives(
    randoms: Randoms,
    shape: tuple[int, int, int],
    kind: tuple[int, float, bool],
    kept: torch.dtype,
) -> None:
    chunks = [
        Chunk(row, end - count, end)
        for row, end, count in zip(random_rows(randoms, ENDS, shape), ENDS, COUNTS, strict=True)
    ]
    dtypes, block_size = (torch.float32, kept), 16 if kind[0] else 7
    out, wanted = attend(randoms.device, chunks, kind, block_size, dtypes)
    assert_near(out, wanted, 4 * max(1.0, shape[2] / 64))  # a score's rounding grows with its terms


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [
        pytest.param(
            dtype,
            kept,
            marks=() if dtype in (torch.bfloat16, kept) else pytest.mark.exhaustive,
        )
        for dtype, kept in product(
            DTYPES, [*DTYPES, torch.float8_e5m2, torch.float8_e4m3fn, torch.int8]
        )
    ],
    ids=str,
)
def test_dtypes(randoms: Randoms, dtype: torch.dtype, kept: torch.dtype) -> None:
    one, other = random_rows(randoms, [80, 81], (6, 2, 64))
    chunks = [Chunk(one, 79, 80), Chunk(other, 50, 81)]
    out, wanted = attend(randoms.device, chunks, dtypes=(dtype, kept))
    assert out.dtype == dtype
    assert_near(out, wanted, 4)


@pytest.mark.parametrize("workspace", [0, 1 << 30], ids=["whole", "split"])
def test_one_token_rows_whole_and_split(
    randoms: Randoms, monkeypatch: pytest.MonkeyPatch, workspace: int
) -> None:
    monkeypatch.setattr(module, "_WORKSPACE", workspace)
    ends = [1, 63, 64, 65, 300, 128, 129]
    rows = random_rows(randoms, ends, (8, 2, 32))
    chunks = [Chunk(row, end - 1, end) for row, end in zip(rows, ends, strict=True)]
    for kind in ((0, 0.0, False), (66, 0.0, False)):
        out, wanted = attend(randoms.device, chunks, kind)
        assert_near(out, wanted, 4)


def test_queries_may_be_a_view_with_strides(randoms: Randoms) -> None:
    rows = random_rows(randoms, [40, 41], (6, 2, 16))
    chunks = [Chunk(row, 30, len(row.q)) for row in rows]
    q, k_cache, v_cache, step = make_step(chunks, 16)
    if randoms.device != "cpu":
        pytest.skip("strides are the same on any device")
    fused = torch.full((len(q), 10, 16), torch.nan)
    fused[:, 1:7] = q
    assert torch.equal(
        module.paged_attention(fused[:, 1:7], k_cache, v_cache, step, 0.3, 0, 0.0),
        module.paged_attention(q, k_cache, v_cache, step, 0.3, 0, 0.0),
    )


def test_large_scores_neither_overflow_nor_vanish(triton_device: str) -> None:
    row = Row.random(100, 2, 1, 16, 5)  # with others two scores may be as near as their rounding
    large = Row(row.q * 1e3, row.k * 1e3, row.v)
    out, wanted = attend(triton_device, [Chunk(large, 0, 100)])
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "kept", "shape", "kind"),
    [
        (torch.float32, torch.float32, (6, 2, 24), KINDS[0]),
        (torch.bfloat16, torch.int8, (4, 2, 16), KINDS[0]),
    ]
    + [
        pytest.param(*dtypes, *case, marks=pytest.mark.exhaustive)
        for dtypes, case in product(
            [*zip(DTYPES, DTYPES, strict=True), *((dtype, torch.int8) for dtype in DTYPES)],
            product([(9, 3, 64), (4, 1, 40)], [KINDS[0], KINDS[3], KINDS[4]]),
        )
    ],
    ids=str,
)
def test_bits_depend_on_nothing_but_the_sequence(
    randoms: Randoms,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    kept: torch.dtype,
    shape: tuple[int, int, int],
    kind: tuple[int, float, bool],
) -> None:
    """Whole, in chunks, token by token; split or not; alone and among others; other blocks."""
    row, *others = random_rows(randoms, [140, 100, 33], shape)

    def run(chunks: list[Chunk], workspace: int, block_size: int = 16) -> torch.Tensor:
        monkeypatch.setattr(module, "_WORKSPACE", workspace)
        return attend(randoms.device, chunks, kind, block_size, (dtype, kept))[0]

    whole = run([Chunk(row, 0, 140)], 0)
    for workspace, firsts, positions in ((0, (0, 57), (63, 139)), (1 << 30, (64, 126), (0, 64))):
        assert torch.equal(run([Chunk(row, 0, 140)], workspace, 9), whole)
        for first in firsts:
            alone = run([Chunk(row, first, first + 9)], workspace)
            assert torch.equal(alone, whole[first : first + 9])
        for position in positions:
            chunk = Chunk(row, position, position + 1)
            assert torch.equal(run([chunk], workspace)[0], whole[position])
            company = [Chunk(others[0], 40, 100), chunk, Chunk(others[1], 32, 33)]
            assert torch.equal(run(company, workspace)[60], whole[position])
