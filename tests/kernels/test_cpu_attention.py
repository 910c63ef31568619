"""The C++ attention: against the reference, and its bits across batches, chunks and threads."""

from __future__ import annotations

import ctypes
import mmap
import sys
from dataclasses import dataclass, replace

import pytest
import torch

from headgate.kernels import reference
from headgate.kernels.cpu import library, operations, set_num_threads
from headgate.kernels.cpu.packed import DTYPES
from headgate.kernels.int8_cache import Int8Cache, PagedCache
from headgate.quant_kinds import BYTE_DIMS
from headgate.shard.attention_metadata import AttentionMetadata
from tests.kernels.paged_rows import Chunk, Row, make_step

pytestmark = pytest.mark.usefixtures("cpu_kernels")

# Heads, key/value heads, head dim: the embedded model's, MHA, MQA, a group of many, odd dims.
SHAPES = [
    (9, 3, 64),
    (4, 4, 72),
    (3, 1, 128),
    (20, 2, 16),
    (4, 2, 30),
    (2, 1, 256),
    (5, 5, 8),
    (4, 2, 96),
]


@dataclass(frozen=True)
class Kind:
    """What attention is asked for."""

    window: int = 0
    cap: float = 0.0
    dtype: torch.dtype = torch.float32
    rounded: bool = False

    def __call__(
        self,
        backend: object,
        q: torch.Tensor,
        k_cache: PagedCache,
        v_cache: PagedCache,
        step: AttentionMetadata,
    ) -> torch.Tensor:
        out: torch.Tensor = backend.paged_attention(  # type: ignore[attr-defined]
            q, k_cache, v_cache, step, 0.3, self.window, self.cap, None, self.rounded
        )
        return out

    def assert_close(self, out: torch.Tensor, expected: torch.Tensor) -> None:
        """A weight is rounded beside the largest score until then, by the reference beside that of
        all; so the two differ where it is close to the middle of two bfloat16 numbers, and where
        the largest was met later. That is little beside what rounding itself changes. So it is
        with queries and weights that are close to the middle of two bytes."""
        dims = BYTE_DIMS if self.dtype == torch.int8 else reference.PAIRED_DIMS
        if self.rounded and out.shape[-1] % dims == 0:
            torch.testing.assert_close(out, expected, rtol=0, atol=8e-3)
            assert (out - expected).abs().mean() < 3e-4
        else:
            torch.testing.assert_close(out, expected, rtol=2e-5, atol=2e-5)


FLOAT32 = Kind()
PAIRS = Kind(dtype=torch.bfloat16, rounded=True)
BYTES = Kind(dtype=torch.int8, rounded=True)
KINDS = [
    FLOAT32,
    Kind(37, 0.0, torch.bfloat16),
    Kind(1, 0.0, torch.float16),
    Kind(300, 4.0, torch.float16),
    Kind(70, 4.0, torch.int8),
    PAIRS,
    Kind(37, 4.0, torch.bfloat16, rounded=True),
    BYTES,
    Kind(37, 4.0, torch.int8, rounded=True),
]
# With a window nothing is shared.
SHARED_KINDS = [
    FLOAT32,
    Kind(37, 0.0, torch.bfloat16),
    Kind(0, 4.0, torch.float16),
    Kind(dtype=torch.int8),
    PAIRS,
    BYTES,
]


def attend(
    chunks: list[Chunk], kind: Kind = FLOAT32, seed: int = 0, block_size: int = 16
) -> list[torch.Tensor]:
    """Each chunk's result."""
    out = kind(operations, *make_step(chunks, block_size, kind.dtype, seed))
    return list(out.split([chunk.last - chunk.first for chunk in chunks]))


def rows(lengths: list[int], heads: int, kv_heads: int, dim: int) -> list[Row]:
    return [Row.random(length, heads, kv_heads, dim, seed) for seed, length in enumerate(lengths)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_ragged_rows_give_what_the_reference_gives(shape: tuple[int, int, int], kind: Kind) -> None:
    ends = [1, 16, 17, 64, 65, 300, 520, 90, 5]
    counts = [1, 1, 17, 1, 2, 3, 1, 70, 5]
    chunks = [
        Chunk(row, end - count, end)
        for row, end, count in zip(rows(ends, *shape), ends, counts, strict=True)
    ]
    for block_size in (16, 7):
        step = make_step(chunks, block_size, kind.dtype)
        kind.assert_close(kind(operations, *step), kind(reference, *step))


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
def test_bits_depend_on_nothing_but_the_sequence(shape: tuple[int, int, int], kind: Kind) -> None:
    """Whole, in chunks of 7, token by token; alone and among others; other blocks, other sizes."""
    length = 290  # past a partition's end
    row, *others = rows([length, 100, 33], *shape)
    (whole,) = attend([Chunk(row, 0, length)], kind)
    for first in [*range(0, 70, 7), *range(245, 290, 7)]:
        last = min(first + 7, length)
        (alone,) = attend([Chunk(row, first, last)], kind, seed=1, block_size=9)
        assert torch.equal(alone, whole[first:last])
    for position in (0, 15, 63, 64, 150, 255, 256, 257, 289):
        company = [Chunk(others[0], 40, 100), Chunk(others[1], 32, 33)]
        one = attend([company[0], Chunk(row, position, position + 1), company[1]], kind, seed=2)
        assert torch.equal(one[1][0], whole[position])


@pytest.mark.parametrize(
    "kind", [FLOAT32, Kind(dtype=torch.float16), Kind(dtype=torch.int8), PAIRS, BYTES], ids=str
)
def test_bits_do_not_depend_on_the_number_of_threads(kind: Kind) -> None:
    """Rows that are long for their step are cut along their keys, and their parts merged."""
    lengths = [700, 1, 520, 300, 1700]
    chunks = [Chunk(row, len(row.q) - 1, len(row.q)) for row in rows(lengths, 6, 2, 64)]
    steps = [chunks[:1], chunks[:4], [*chunks, Chunk(chunks[0].row, 100, 400)]]
    set_num_threads(1)
    expected = [attend(step, kind) for step in steps]
    for threads in (2, 5):
        set_num_threads(threads)
        for _ in range(5):
            for step, want in zip(steps, expected, strict=True):
                assert all(map(torch.equal, attend(step, kind), want))


def continued(row: Row, first: int, length: int, seed: int) -> Row:
    """Another row with this one's first positions."""
    heads, dim = row.q.shape[1:]
    other = Row.random(length - first, heads, row.k.shape[1], dim, seed)
    pairs = (row.q, other.q), (row.k, other.k), (row.v, other.v)
    return Row(*(torch.cat([begin[:first], rest]) for begin, rest in pairs))


@pytest.mark.parametrize("shape", [*SHAPES, (71, 1, 8), (5, 5, 64)], ids=str)
@pytest.mark.parametrize("kind", SHARED_KINDS, ids=str)
@pytest.mark.parametrize("block_size", [16, 7])
@pytest.mark.parametrize("tokens", [[1], [1, 3, 9, 2, 5], [4]])
def test_bits_do_not_depend_on_who_shares_a_rows_blocks(
    shape: tuple[int, int, int],
    kind: Kind,
    block_size: int,
    tokens: list[int],
) -> None:
    """Two families of rows, in one of them a family with more in common; some of more tokens than
    they have of their own."""
    first, second = rows([620, 300], *shape)
    inner = continued(first, 300, 1100, seed=7)
    parents = [(first, 520), (inner, 1030), (second, 260)]
    members = [0, 1, 2, 0, 1, 2, 0, 1, 1, 0, 2, 0]
    chunks, shared = [], []
    for seed, member in enumerate(members):
        parent, common = parents[member]
        length = common + 1 + 37 * (seed % 4)
        row = continued(parent, common, length, seed=20 + seed)
        count = 40 if seed == 5 else tokens[seed % len(tokens)]
        chunks.append(Chunk(row, length - count, length))
        shared.append(common // block_size)
    q, k_cache, v_cache, step = make_step(chunks, block_size, kind.dtype)
    tables = step.block_tables.clone()
    for place, member in enumerate(members):
        model = tables[members.index(member)]
        tables[place, : shared[place]] = model[: shared[place]]
        if member == 1:
            tables[place, : 300 // block_size] = tables[0, : 300 // block_size]
    alike = replace(step, block_tables=tables)
    for threads in (1, 3):
        set_num_threads(threads)
        outs = [kind(operations, q, k_cache, v_cache, each) for each in (step, alike)]
        assert torch.equal(*outs)
        kind.assert_close(outs[1], kind(reference, q, k_cache, v_cache, step))


def test_plans_made_before_serve_only_what_they_were_made_for() -> None:
    """Layers of a step share a plan: what it depends on is changed in place, and back."""
    length, others = 700, 4
    first = Row.random(length, 6, 2, 32, seed=0)
    family = [first, *(continued(first, 600, length, seed) for seed in range(1, others))]
    q, k_cache, v_cache, step = make_step([Chunk(row, length - 2, length) for row in family], 16)
    apart = step.block_tables.clone()
    alike = apart.clone()
    alike[:, :37] = apart[0, :37]
    ends, even = step.context_lens.clone(), step.cu_query_lens.clone()
    uneven = torch.tensor([0, 1, 5, 6, 8])
    set_num_threads(3)
    for window in (0, 300, 0, 45, 7, 90, 300, 0):
        for tables in (apart, alike, apart):
            for less, starts in ((0, even), (400, even), (400, uneven), (0, uneven), (0, even)):
                step.block_tables.copy_(tables)
                step.context_lens.copy_(ends - less)
                step.cu_query_lens.copy_(starts)
                arguments = (q, k_cache, v_cache, step, 0.2, window, 0.0)
                expected = reference.paged_attention(*arguments)
                FLOAT32.assert_close(operations.paged_attention(*arguments), expected)


def test_bits_do_not_depend_on_the_instruction_set(cpu_kernels: str) -> None:
    """Where it has fused multiply-adds."""
    loaded = library.load()
    if cpu_kernels != "avx512" or loaded is None or loaded.hg_init(b"avx2") is None:
        pytest.skip("two such sets are compared in one go")
    for dim in (72, 80, 96):
        row = rows([290], 9, 3, dim)[0]
        chunks = [Chunk(row, 0, 250), Chunk(row, 280, 283), Chunk(row, 289, 290)]
        for kind in [*(Kind(dtype=dtype) for dtype in (*DTYPES, torch.int8)), PAIRS, BYTES]:
            results = []
            for name in (b"avx2", b"avx512"):
                loaded.hg_init(name)
                results.append(attend(chunks, kind))
            assert all(map(torch.equal, *results))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8, torch.bfloat16])
def test_only_narrow_caches_and_whole_lanes_are_rounded_for(dtype: torch.dtype) -> None:
    least = {torch.bfloat16: reference.PAIRED_DIMS, torch.int8: BYTE_DIMS}
    for dim in (24, 48, 32):
        chunks = [Chunk(row, 30, 40) for row in rows([40] * 2, 6, 2, dim)]
        given, asked = (
            torch.cat(attend(chunks, Kind(dtype=dtype, rounded=rounded)))
            for rounded in (False, True)
        )
        assert torch.equal(given, asked) == (dtype not in least or dim % least[dtype] > 0)


@pytest.mark.skipif(sys.platform != "linux", reason="pages are protected by Linux's mprotect")
@pytest.mark.parametrize("dim", [32, 96, 64])
def test_nothing_is_read_past_a_caches_end(dim: int) -> None:
    """The last position's bytes end where memory ends, with many queries and with few."""
    row = rows([16], 4, 2, dim)[0]
    q, k_cache, v_cache, step = make_step([Chunk(row, 0, 16), Chunk(row, 15, 16)], 16, torch.int8)
    assert isinstance(k_cache, Int8Cache) and isinstance(v_cache, Int8Cache)
    last = len(k_cache.values) - 1
    for table in step.block_tables:  # both rows are in the last block
        for cache in (k_cache, v_cache):
            for part in (cache.values, cache.scales):
                part[last] = part[table[0]]
        table[0] = last
    guarded = [Int8Cache(before_the_end(c.values), c.scales) for c in (k_cache, v_cache)]
    call = (q, *guarded, step)
    assert torch.equal(BYTES(operations, *call), BYTES(operations, q, k_cache, v_cache, step))


def before_the_end(x: torch.Tensor) -> torch.Tensor:
    """A copy behind which lies a page that nobody may read."""
    page = mmap.PAGESIZE
    whole = -(-x.nbytes // page) * page
    memory = mmap.mmap(-1, whole + page)
    held = torch.frombuffer(memory, dtype=x.dtype)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(held.data_ptr() + whole), page, 0) == 0  # PROT_NONE
    copy = held[whole - x.nbytes : whole].view(x.shape)
    return copy.copy_(x)


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
