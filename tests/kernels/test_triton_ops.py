"""The Triton operations on single tokens, against the reference in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from headgate.kernels import ops, reference, triton
from headgate.kernels.int8_cache import Int8Cache
from tests.kernels.paged_rows import empty_cache
from tests.kernels.randoms import DTYPES, TOLERANCE, Randoms, assert_near

OPS = triton.OPS

# Rows and width: one row, no row, widths that fill no vector, one beyond a program's rows.
SHAPES = [(1, 64), (5, 576), (0, 64), (17, 100), (3, 1), (2, 5000)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
class TestNorms:
    def test_rms_norm(self, randoms: Randoms, dtype: torch.dtype, shape: tuple[int, int]) -> None:
        x, weight = randoms(*shape, dtype=dtype), randoms(shape[1], dtype=dtype)
        wanted = reference.rms_norm(x.float(), weight.float(), 1e-5)
        assert_near(OPS["rms_norm"](x, weight, 1e-5), wanted)

    def test_with_residual(
        self, randoms: Randoms, dtype: torch.dtype, shape: tuple[int, int]
    ) -> None:
        x, residual = randoms(*shape, dtype=dtype), randoms(*shape, dtype=dtype)
        weight = randoms(shape[1], dtype=dtype)
        wanted = reference.rms_norm_residual(x.float(), residual.float(), weight.float(), 1e-5)
        normed, total = OPS["rms_norm_residual"](x.clone(), residual.clone(), weight, 1e-5)
        assert_near(normed, wanted[0], 2)
        assert_near(total, wanted[1])

    @pytest.mark.parametrize("with_bias", [True, False])
    def test_layer_norm(
        self, randoms: Randoms, dtype: torch.dtype, shape: tuple[int, int], with_bias: bool
    ) -> None:
        x = randoms(*shape, dtype=dtype) + 3
        weight, bias = randoms(shape[1], dtype=dtype), randoms(shape[1], dtype=dtype)
        wide = bias.float() if with_bias else None
        wanted = reference.layer_norm(x.float(), weight.float(), wide, 1e-5)
        assert_near(OPS["layer_norm"](x, weight, bias if with_bias else None, 1e-5), wanted, 2)


def test_norms_of_heads_within_a_fused_projection(randoms: Randoms) -> None:
    fused = randoms(6, 10, 64)
    heads, weight = fused[:, 2:7], randoms(64)
    wanted = reference.rms_norm(heads, weight, 1e-6)
    assert_near(OPS["rms_norm"](heads, weight, 1e-6), wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parts_of_a_sum_are_added_as_all_reduce_adds_them(
    randoms: Randoms, dtype: torch.dtype
) -> None:
    parts, weight = randoms(3, 5, 200, dtype=dtype), randoms(200, dtype=dtype)
    residual = randoms(5, 200, dtype=dtype)
    total = (parts[0] + parts[1]) + parts[2]
    for op in (OPS["rms_norm_residual"], reference.rms_norm_residual):
        wanted = OPS["rms_norm_residual"](total.clone(), residual.clone(), weight, 1e-5)
        got = op(parts.clone(), residual.clone(), weight, 1e-5)
        for ours, theirs in zip(got, wanted, strict=True):
            if op is reference.rms_norm_residual:
                assert_near(ours, theirs.float(), 2)
            elif dtype != torch.bfloat16:  # which the interpreter does not round as PyTorch does
                assert torch.equal(ours, theirs)
            else:
                assert_near(ours, theirs.float(), 4)


def test_residual_with_strides(randoms: Randoms) -> None:
    wide, residual, weight = randoms(4, 3, 64), randoms(4, 2, 64), randoms(64)
    x, beside = wide[:, 1], wide[:, 2].clone()
    wanted = reference.rms_norm_residual(x, residual[:, 0], weight, 1e-5)
    got = OPS["rms_norm_residual"](x, residual[:, 0], weight, 1e-5)
    for ours, theirs in zip(got, wanted, strict=True):
        assert_near(ours, theirs)
    assert torch.equal(wide[:, 2], beside), "the norm reached over its rows' end"


def test_a_row_of_zeros_and_large_rows(randoms: Randoms) -> None:
    x = torch.stack((torch.zeros(96), torch.full((96,), 1e18), torch.full((96,), 1e-30)))
    x, weight = x.to(randoms.device), randoms(96)
    got, wanted = OPS["rms_norm"](x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5)
    assert_near(got, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 2), (3, 2 * 190), (2, 2 * 1500), (0, 8)], ids=str)
def test_gates(randoms: Randoms, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x = randoms(*shape, dtype=dtype) * 4
    assert_near(OPS["silu_and_mul"](x), reference.silu_and_mul(x.float()), 2)
    for tanh in (False, True):
        assert_near(OPS["gelu_and_mul"](x, tanh), reference.gelu_and_mul(x.float(), tanh), 8)


def test_gates_of_extreme_values(triton_device: str) -> None:
    gate = torch.tensor([-1e30, -100.0, -0.0, 0.0, 100.0, 1e30], device=triton_device)
    x = torch.cat((gate, torch.ones_like(gate))).unsqueeze(0)
    assert_near(OPS["silu_and_mul"](x), reference.silu_and_mul(x))
    assert_near(OPS["gelu_and_mul"](x, True), reference.gelu_and_mul(x, True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stored", DTYPES, ids=str)
def test_embedding(randoms: Randoms, dtype: torch.dtype, stored: torch.dtype) -> None:
    weight = randoms(30, 1100, dtype=stored)
    ids = randoms.integers(-5, 60, 40)
    got = OPS["embedding"](ids, weight, 10, dtype)
    assert got.dtype == dtype
    assert_near(got, reference.embedding(ids, weight.float(), 10, torch.float32))
    assert not got[(ids < 10) | (ids >= 40)].any()
    assert OPS["embedding"](ids[:0], weight, 10, dtype).shape == (0, 1100)


# Heads, key/value heads, head dim, rotated dims.
ROTARY_SHAPES = [(9, 3, 8, 8), (4, 1, 64, 32), (2, 2, 80, 80), (5, 5, 30, 14), (8, 2, 256, 256)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ROTARY_SHAPES, ids=str)
def test_rotary(randoms: Randoms, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    heads, kv_heads, dim, rotated = shape
    fused = randoms(7, heads + 2 * kv_heads, dim, dtype=dtype)
    q, k, v = fused.split((heads, kv_heads, kv_heads), dim=1)
    positions, table = randoms.integers(0, 50, 7), randoms(50, rotated)
    wanted = reference.rotary_embedding(q.float(), k.float(), positions, table)
    # Alone.
    for got, want in zip(
        OPS["rotary_embedding"](q.clone(), k.clone(), positions, table), wanted, strict=True
    ):
        assert_near(got, want, 2)
    # With the write; a slot below zero is padding.
    caches = [torch.full((5, 3, kv_heads, dim), torch.nan).to(q) for _ in range(2)]
    slots = torch.tensor([14, 0, 7, 3, -1, 9, 1], device=q.device)
    value = v.clone()
    got_q = OPS["rotary_and_write_kv"](q, k, v, positions, table, *caches, slots)
    assert_near(got_q, wanted[0], 2)
    written = slots[slots >= 0]
    for cache, want in zip(caches, (wanted[1], value.float()), strict=True):
        rows = cache.flatten(0, 1)
        assert_near(rows[written], want[slots >= 0], 2)
        untouched = torch.ones(15, dtype=torch.bool, device=q.device)
        untouched[written] = False
        assert rows[untouched].isnan().all()


def assert_same_int8(got: Int8Cache, wanted: Int8Cache) -> None:
    """But for a number halfway between two, which a GPU's fused operations may round to either."""
    torch.testing.assert_close(got.scales, wanted.scales, rtol=1e-6, atol=0, equal_nan=True)
    apart = (got.values.int() - wanted.values.int()).abs()
    assert apart.max() <= 1 and apart.float().mean() < 1e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ROTARY_SHAPES, ids=str)
def test_into_an_int8_cache(
    randoms: Randoms, dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> None:
    """With rotation and without; heads of any size, with nothing in them, infinities and NaN."""
    heads, kv_heads, dim, rotated = shape
    fused = randoms(7, heads + 2 * kv_heads, dim, dtype=dtype)
    fused *= torch.logspace(-4, 4, 7, device=fused.device).to(dtype)[:, None, None]
    fused[1, -1] = 0
    fused[2, -1, dim // 2], fused[3, -1, dim - 1] = torch.inf, torch.nan
    q, k, v = fused.split((heads, kv_heads, kv_heads), dim=1)
    positions, table = randoms.integers(0, 50, 7), randoms(50, rotated)
    slots = torch.tensor([14, 0, 7, 3, -1, 9, 1], device=q.device)
    there = slots >= 0
    _, turned = OPS["rotary_embedding"](q.clone(), k.clone(), positions, table)

    def caches() -> list[Any]:
        return [empty_cache((5, 3, kv_heads, dim), torch.int8, q.device) for _ in "kv"]

    wanted, got, unturned = caches(), caches(), caches()
    reference.write_kv(turned[there], v[there], *wanted, slots[there])
    OPS["write_kv"](turned, v, *unturned, slots)
    OPS["rotary_and_write_kv"](q, k, v, positions, table, *got, slots)
    for ours, also_ours, theirs in zip(got, unturned, wanted, strict=True):
        read = ours[:].flatten(0, 1)
        if theirs is wanted[1]:
            assert not read[0, -1].any() and read[7, -1].isnan().all() and read[3, -1].isnan().all()
            for cache in (ours, also_ours, theirs):  # which numbers are with a NaN is all the same
                for slot in (7, 3):
                    cache.values[slot // 3, slot % 3, -1] = 0
        assert_same_int8(ours, theirs)
        assert_same_int8(also_ours, theirs)
        assert read[2].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_float16_cannot_hold_is_cut(randoms: Randoms, dtype: torch.dtype) -> None:
    """No infinity gets into the cache; NaN does."""
    k, v = randoms(3, 2, 16, dtype=dtype) * 3e4, randoms(3, 2, 16, dtype=dtype) * 3e4
    k[0, 0, :3] = v[0, 0, :3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    slots, positions = torch.arange(3, device=k.device), torch.zeros(3, dtype=torch.int64)
    table = torch.ones(1, 16, device=k.device)  # sums and differences: beyond float16's range
    calls = {
        "write_kv": lambda ops, caches: ops["write_kv"](k, v, *caches, slots),
        "rotary_and_write_kv": lambda ops, caches: ops["rotary_and_write_kv"](
            k.clone(), k.clone(), v, positions.to(k.device), table, *caches, slots
        ),
    }
    for call in calls.values():
        written = []
        for ops_of in (OPS, reference.OPS):
            caches = [torch.zeros(1, 3, 2, 16, device=k.device).half() for _ in "kv"]
            call(ops_of, caches)
            written.append(torch.stack(caches))
        got, wanted = written
        assert not got.isinf().any() and not wanted.isinf().any()
        assert (wanted.abs() == 65504).any() and wanted.isnan().any()
        torch.testing.assert_close(got, wanted, rtol=TOLERANCE[dtype], atol=1, equal_nan=True)


@pytest.mark.parametrize("kept", [*DTYPES, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_write_kv_into_any_cache(randoms: Randoms, kept: torch.dtype) -> None:
    k, v = randoms(6, 3, 24) * 20, randoms(6, 3, 24)
    if kept.itemsize == 1:  # rounding to 8 bits is the GPU's affair: the interpreter's has faults
        k, v = k.to(kept).float(), v.to(kept).float()
    k[0, 0, 0], k[1, 0, 1] = 1e6, -1e6
    shape = (4, 2, 3, 24)
    caches, wanted = (
        [torch.zeros(shape, device=k.device).to(kept) for _ in range(2)] for _ in range(2)
    )
    slots = torch.tensor([7, 1, 0, 4, 5, 2], device=k.device)
    OPS["write_kv"](k, v, *caches, slots)
    reference.write_kv(k, v, *wanted, slots)
    step = torch.finfo(kept).eps
    for got, want in zip(caches, wanted, strict=True):
        torch.testing.assert_close(got.float(), want.float(), rtol=step, atol=step)


def test_the_table_takes_the_kernels_and_the_rest_is_the_reference(triton_device: str) -> None:
    before = ops.active()
    try:
        assert ops.use("triton", triton_device) == "triton"
        assert ops.active() == "triton"
        assert ops._table["linear"] is OPS["linear"]
        ops.use("triton", triton_device, batch_invariant=True)
        assert ops._table["linear"] is triton.BATCH_INVARIANT["linear"]
        ops.use("cpu", batch_invariant=True)
        with pytest.raises(ops.BackendUnavailable, match="--batch-invariant: products of the"):
            ops.use("reference", batch_invariant=True)
    finally:
        ops.use(before)
    assert set(OPS) <= set(reference.OPS) | ops.OPTIONAL
