"""The C++ operations but attention, against the reference; and the bits of each row."""

from __future__ import annotations

import pytest
import torch

from headgate.kernels import reference
from headgate.kernels.cpu import library, operations, set_num_threads
from headgate.kernels.cpu.packed import PackedWeight
from tests.kernels.paged_rows import empty_cache, widened

pytestmark = pytest.mark.usefixtures("cpu_kernels")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pack(weight: torch.Tensor, dtype: torch.dtype) -> PackedWeight:
    packed = operations.pack_linear(weight, dtype)
    assert isinstance(packed, PackedWeight)
    return packed


# ------------------------------------------------------------------ linear


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(96, 64), (70, 7), (1, 1), (33, 577), (5, 1030)], ids=str)
def test_linear(dtype: torch.dtype, size: tuple[int, int]) -> None:
    columns, inner = size
    weight, bias = random(columns, inner).to(dtype), random(columns, seed=1)
    packed = pack(weight.float(), dtype)
    for rows in (1, 2, 5, 6, 7, 12, 13, 29):
        x = random(rows, inner, seed=rows)
        product = x.double() @ weight.double().T
        scale = inner**0.5 * 2e-6
        torch.testing.assert_close(
            operations.linear(x, packed, None).double(), product, rtol=1e-5, atol=scale
        )
        torch.testing.assert_close(
            operations.linear(x, packed, bias).double(), product + bias, rtol=1e-5, atol=scale
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_linear_has_the_same_bits_in_any_batch(dtype: torch.dtype) -> None:
    packed = pack(random(200, 600), dtype)
    x = random(67, 600, seed=1)
    whole = operations.linear(x, packed, None)
    for rows in (1, 2, 3, 4, 8, 11, 12, 13, 40):
        for first in (0, 20):
            part = operations.linear(x[first : first + rows], packed, None)
            assert torch.equal(part, whole[first : first + rows])


def test_linear_agrees_across_threads_and_fused_instruction_sets() -> None:
    packed, x = pack(random(1000, 513), torch.bfloat16), random(40, 513, seed=1)
    here = operations.linear(x, packed, None)
    for threads in (1, 3, 8):
        set_num_threads(threads)
        assert torch.equal(operations.linear(x, packed, None), here)
    loaded = library.load()
    assert loaded is not None
    names = [name for name in (b"avx2", b"avx512") if loaded.hg_init(name)]
    results = []
    for name in names:
        loaded.hg_init(name)
        results.append(operations.linear(x, packed, None))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_extreme_weights_are_widened_exactly(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    smallest = limits.tiny * limits.eps  # a subnormal
    values = [limits.max, limits.min, limits.tiny, smallest, -smallest, 0.0, 1.0 + limits.eps]
    weight = torch.tensor(values).to(dtype).float().unsqueeze(1)
    one = operations.linear(torch.ones(1, 1), pack(weight, dtype), None)
    assert weight[3] != 0
    assert torch.equal(one, weight.T)


@pytest.mark.parametrize("size", [(96, 64), (70, 7), (1, 1), (33, 577), (5, 1030)], ids=str)
def test_medium_precision_has_the_bits_of_rounded_inputs(size: tuple[int, int]) -> None:
    """So it has all that float32 arithmetic promises: any batch, any number of threads."""
    weight, bias = random(*size), random(size[0], seed=1)
    highest = pack(weight, torch.bfloat16)
    medium = operations.pack_linear(weight, torch.bfloat16, "", "medium")
    assert isinstance(medium, PackedWeight) and medium.nbytes == highest.nbytes
    for rows in (1, 2, 5, 6, 7, 12, 13, 29):
        x = random(rows, size[1] + 3, seed=rows)[:, :-3] * 3.0
        rounded = x.bfloat16().float()
        assert not torch.equal(rounded, x)
        for given in (None, bias):
            expected = operations.linear(rounded, highest, given)
            assert torch.equal(operations.linear(x, medium, given), expected)
    expected = reference.linear(
        x, reference.pack_linear(weight, torch.bfloat16, "", "medium"), None
    )
    got = operations.linear(x, medium, None)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=size[1] ** 0.5 * 6e-6)


def test_medium_precision_rounds_as_torch_does() -> None:
    values = [0.0, -0.0, 1.0, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8 - 2**-20, 3.4e38, 2.0**-126]
    special = [float("inf"), float("-inf"), float("nan"), -float("nan"), 3.4028235e38]
    x = torch.tensor([*values, *special]).unsqueeze(1)
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32)  # more that are no numbers
    x = torch.cat([x, bits.view(torch.float32).unsqueeze(1)])
    medium = operations.pack_linear(torch.ones(1, 1), torch.bfloat16, "", "medium")
    got = operations.linear(x, medium, None)
    torch.testing.assert_close(got, x.bfloat16().float(), rtol=0, atol=0, equal_nan=True)


def test_linear_takes_rows_with_strides_and_more_dimensions() -> None:
    packed, x = pack(random(40, 16), torch.float32), random(6, 50, seed=1)
    part = x[:, 10:26]
    expected = operations.linear(part.contiguous(), packed, None)
    assert torch.equal(operations.linear(part, packed, None), expected)
    folded = operations.linear(part.contiguous().view(2, 3, 16), packed, None)
    assert torch.equal(folded, expected.view(2, 3, 40))
    assert operations.linear(x[:0, :16], packed, None).shape == (0, 40)


def test_linear_refuses_what_would_be_read_wrongly() -> None:
    packed = pack(random(4, 8), torch.float32)
    for x in (random(2, 7), random(2, 8).double(), random(8, 2).T):
        with pytest.raises(ValueError, match="float32 rows of 8"):
            operations.linear(x, packed, None)
    with pytest.raises(ValueError, match="bias"):
        operations.linear(random(2, 8), packed, random(3))


# ------------------------------------------------------------------ the others


@pytest.mark.parametrize("size", [576, 64, 7, 1])
def test_norms(size: int) -> None:
    x, residual, weight = random(33, size), random(33, size, seed=1), random(size, seed=2)
    out = operations.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(out, reference.rms_norm(x, weight, 1e-5))
    expected = reference.rms_norm_residual(x, residual, weight, 1e-5)
    got = operations.rms_norm_residual(x.clone(), residual.clone(), weight, 1e-5)
    torch.testing.assert_close(got, expected)
    assert torch.equal(operations.rms_norm(x[5:6], weight, 1e-5), out[5:6])


def test_norm_of_heads_inside_a_fused_row() -> None:
    fused, weight = random(5, 100), random(16, seed=1)
    heads = fused[:, 10:74].view(5, 4, 16)
    torch.testing.assert_close(
        operations.rms_norm(heads, weight, 1e-6), reference.rms_norm(heads, weight, 1e-6)
    )


@pytest.mark.parametrize("size", [1536, 40, 3])
def test_gated_activations(size: int) -> None:
    x = random(9, 2 * size) * 4
    x[0, :2] = torch.tensor([3000.0, -3000.0])
    pairs = [
        (operations.silu_and_mul(x), reference.silu_and_mul(x)),
        (operations.gelu_and_mul(x, True), reference.gelu_and_mul(x, True)),
        (operations.gelu_and_mul(x, False), reference.gelu_and_mul(x, False)),
    ]
    for got, want in pairs:
        torch.testing.assert_close(got, want, rtol=3e-6, atol=3e-6)
    assert torch.equal(operations.silu_and_mul(x[4:5]), pairs[0][0][4:5])


def test_many_rows_have_the_same_bits_on_any_number_of_threads() -> None:
    x, residual, weight = random(2300, 70), random(2300, 70, seed=1), random(70, seed=2)
    ids = torch.arange(2300) * 7 % 2300

    def results() -> list[torch.Tensor]:
        return [
            operations.rms_norm(x, weight, 1e-5),
            *operations.rms_norm_residual(x.clone(), residual.clone(), weight, 1e-5),
            operations.silu_and_mul(x),
            operations.embedding(ids, residual, 0, torch.float32),
        ]

    set_num_threads(1)
    expected = results()
    for threads in (2, 3, 8, 70):
        set_num_threads(threads)
        assert all(map(torch.equal, results(), expected))


@pytest.mark.parametrize("rotated", [64, 32, 6])
def test_rotary_embedding_of_views(rotated: int) -> None:
    fused = random(7, 960)
    expected_source = fused.clone()
    parts = []
    for source in (fused, expected_source):
        parts.append((source[:, :576].view(7, 9, 64), source[:, 576:768].view(7, 3, 64)))
    positions = torch.tensor([0, 5, 99, 3, 3, 50, 1])
    table = random(100, rotated, seed=1)
    expected = reference.rotary_embedding(*parts[1], positions, table)
    got = operations.rotary_embedding(*parts[0], positions, table)
    torch.testing.assert_close(got, expected)
    assert torch.equal(fused[:, 768:], expected_source[:, 768:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_write_kv_rounds_as_torch_does(dtype: torch.dtype) -> None:
    fused = random(40, 3 * 24) * torch.logspace(-9, 6, 40).unsqueeze(1)
    fused[0, :4] = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0])
    k, v = fused[:, :24].view(40, 3, 8), fused[:, 24:48].view(40, 3, 8)
    slots = torch.randperm(48, generator=torch.Generator().manual_seed(0))[:40]
    caches = []
    for write in (operations.write_kv, reference.write_kv):
        k_cache, v_cache = (torch.full((6, 8, 3, 8), 7.0, dtype=dtype) for _ in range(2))
        write(k, v, k_cache, v_cache, slots)
        caches.append(torch.cat((k_cache, v_cache)).nan_to_num(123))
    assert torch.equal(*caches)


@pytest.mark.parametrize("dim", [8, 30])
def test_write_kv_into_int8_as_the_reference(dim: int) -> None:
    fused = random(40, 3 * 2 * dim) * torch.logspace(-33, 30, 40).unsqueeze(1)
    fused[7, : 2 * dim] = 0
    fused[8, 0], fused[9, dim - 1] = torch.inf, torch.nan
    k, v = fused[:, : 3 * dim].view(40, 3, dim), fused[:, 3 * dim :].view(40, 3, dim)
    slots = torch.randperm(48, generator=torch.Generator().manual_seed(0))[:40]
    found = []
    for write in (operations.write_kv, reference.write_kv):
        caches = [empty_cache((6, 8, 3, dim), torch.int8) for _ in "kv"]
        write(k, v, *caches, slots)
        found.append(torch.stack([widened(cache) for cache in caches]))
    torch.testing.assert_close(*found, rtol=0, atol=0, equal_nan=True)
    kept = found[0].flatten(1, 2)[:, slots]
    assert kept[0, 8, 0].isnan().all() and kept[0, 9, 0].isnan().all() and not kept[0, 7, 0].any()
    largest = k.abs().amax(-1, keepdim=True)
    near = (kept[0] - k).abs() <= largest / 253
    assert near[((largest > 1e-29) & largest.isfinite()).expand_as(near)].all()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8])
@pytest.mark.parametrize("normed", [False, True])
def test_rotary_and_write_kv(dtype: torch.dtype, normed: bool) -> None:
    """Against the reference, and the bits of the separate operations."""
    sizes, dim = (6, 2, 2), 16
    qkv, table = random(40, sum(sizes) * dim), random(100, 12, seed=1)
    positions, slots = torch.arange(40) * 2 + 7, torch.arange(47, 7, -1)
    norms = (random(dim, seed=2), random(dim, seed=3), 1e-6) if normed else None
    results = []
    for module in (operations, reference):
        caches = [empty_cache((6, 8, 2, dim), dtype) for _ in "kv"]
        parts = qkv.clone().view(40, -1, dim).split(sizes, dim=1)
        q = module.rotary_and_write_kv(*parts, positions, table, *caches, slots, norms)  # type: ignore[attr-defined]
        results.append((q, *map(widened, caches)))
    close = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.int8: 0.03}[
        dtype
    ]
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=close, atol=close, equal_nan=True)
    q, k, v = qkv.clone().view(40, -1, dim).split(sizes, dim=1)
    if norms:
        q, k = operations.rms_norm(q, norms[0], 1e-6), operations.rms_norm(k, norms[1], 1e-6)
    q, k = operations.rotary_embedding(q, k, positions, table)
    caches = [empty_cache((6, 8, 2, dim), dtype) for _ in "kv"]
    operations.write_kv(k, v, *caches, slots)
    for got, want in zip(results[0], (q, *map(widened, caches)), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_other_dtypes_are_left_to_the_reference() -> None:
    x, weight = random(3, 8).double(), random(8).double()
    assert torch.equal(operations.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    assert operations.silu_and_mul(x).dtype == torch.float64
    assert operations.linear(x, weight.view(1, 8), None).dtype == torch.float64
