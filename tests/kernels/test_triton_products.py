"""Products with quantised and grouped weights in Triton, against plain torch in float32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from headgate import quant_kinds
from headgate.kernels import quantised
from headgate.kernels import reference_products as reference
from headgate.kernels.int4_weight import AWQ_ORDER, Int4Weight
from headgate.kernels.reference import RoundedTensor
from headgate.kernels.triton import product
from headgate.kernels.triton.grouped_linear import RowTiles, grouped_linear, route
from headgate.kernels.triton.linear import linear
from headgate.kernels.triton.linear_dense import linear as linear_dense
from headgate.kernels.triton.linear_fp8 import linear_fp8, quantise_fp8
from headgate.kernels.triton.linear_int4 import linear_int4
from headgate.kernels.triton.linear_int8 import linear_int8, quantise_rows
from headgate.kernels.triton.lora import add_lora
from headgate.kernels.triton.moe import moe_mlp
from headgate.kernels.triton.packed_weight import PackedQuantised
from tests.kernels.randoms import DTYPES, Randoms, assert_near

# Rows, inputs, outputs: a row, a sum in several splits, widths that fill no tile, no row.
SOME_DTYPES = [
    torch.float32,
    *(pytest.param(dtype, marks=pytest.mark.exhaustive) for dtype in DTYPES[1:]),
]
SHAPES = [(1, 64, 8), (5, 224, 72), (66, 100, 66), (0, 64, 8)]


@pytest.fixture(autouse=True)
def short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums as short as those of SHAPES are cut."""
    monkeypatch.setattr(product, "_SHORTEST_SPLIT", 64)


def near(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Relative to the largest: sums cancel."""
    scale = wanted.abs().max().item() if wanted.numel() else 1.0
    assert_near(got / scale, wanted / scale, 4)


@pytest.mark.parametrize("kind", quant_kinds.KINDS)
@pytest.mark.parametrize("dtype", SOME_DTYPES, ids=str)
def test_quantised_kinds(randoms: Randoms, kind: str, dtype: torch.dtype) -> None:
    for rows, inner, width in SHAPES:
        weight = quantised.quantise(randoms(width, inner), quant_kinds.KINDS[kind])
        packed = PackedQuantised.of(weight)
        x, bias = randoms(rows, inner, dtype=dtype), randoms(width, dtype=dtype)
        wanted = quantised.linear(x.float(), weight)
        if kind == "int4":  # whose inputs these kernels take as they are
            wanted = F.linear(x.float(), weight.dequantise())
        near(linear(x, packed, bias), wanted + bias.float())


def test_quantised_rows_are_the_reference_s(randoms: Randoms) -> None:
    x = randoms(7, 200)
    x[2], x[3, 64:128] = 0.0, 0.0
    for group in (32, 64, 200):
        values, scales = quantise_rows(x, group)
        wanted, wanted_scales = quantised.quantise_inputs(x, group)
        assert torch.equal(values.float(), wanted.flatten(1))
        assert torch.equal(scales.T, wanted_scales)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain_weights(randoms: Randoms, dtype: torch.dtype) -> None:
    for rows, inner, width in SHAPES:
        weight = randoms(width, inner, dtype=dtype)
        x, bias = randoms(rows, inner, dtype=dtype), randoms(width, dtype=dtype)
        near(linear_dense(x, weight, bias), F.linear(x.float(), weight.float(), bias.float()))
    rounded = RoundedTensor(weight.float())
    wanted = F.linear(x.bfloat16().float(), weight.float())
    near(linear_dense(x.float(), rounded, None), wanted)
    # Rows of a wider tensor; and inputs of more dimensions.
    wide = randoms(4, 2 * inner, dtype=dtype)
    got = linear_dense(wide[:, :inner].view(2, 2, inner), weight, None)
    near(got, F.linear(wide[:, :inner].float(), weight.float()).view(2, 2, width))


@pytest.mark.parametrize("with_bias", [True, False])
def test_int8_per_channel(randoms: Randoms, with_bias: bool) -> None:
    for rows, inner, width in [(1, 64, 8), (5, 224, 72), (66, 96, 66)]:
        weight = randoms.integers(-127, 128, width, inner).to(torch.int8)
        scales, x = randoms(width).abs(), randoms(rows, inner)
        bias = randoms(width) if with_bias else None
        got = linear_int8(x, weight, scales, bias)
        near(got, reference.linear_int8(x, weight, scales, bias))
    with pytest.raises(ValueError, match="32 divides, not 100"):
        linear_int8(randoms(1, 100), weight[:, :1].expand(-1, 100), scales, None)


@pytest.mark.parametrize("dtype", SOME_DTYPES, ids=str)
@pytest.mark.parametrize("scaled", ["tensor", "channel", "block"])
def test_fp8(randoms: Randoms, scaled: str, dtype: torch.dtype) -> None:
    for rows, inner, width in SHAPES:
        weight = randoms(width, inner).to(reference.FP8)
        blocks = (-(-width // 128), -(-inner // 128))
        scales = randoms(*{"tensor": (1,), "channel": (width,), "block": blocks}[scaled]).abs()
        x, bias = randoms(rows, inner, dtype=dtype), randoms(width, dtype=dtype)
        got = linear_fp8(x, weight, scales, bias)
        # From the kernel's own 8-bit inputs: the interpreter cuts off what a GPU rounds.
        group = 128 if scaled == "block" else inner
        values, x_scales = quantise_fp8(x, group)
        wide = values.float() * x_scales.repeat_interleave(group, 1)[:, :inner]
        spread = scales.reshape(-1, 1)
        if scaled == "block":
            spread = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[:width, :inner]
        near(got, wide @ (weight.float() * spread).T + bias.float())


def test_fp8_inputs(randoms: Randoms) -> None:
    x = randoms(5, 300)
    x[1] = 0.0
    for group in (128, 300):
        values, scales = quantise_fp8(x, group)
        wanted, wanted_scales = reference.quantise_fp8(x, group)
        assert torch.equal(scales, wanted_scales)
        wide, wanted_wide = values.float(), wanted.float()
        # The interpreter rounds up to a power of two without the carry: half of it comes out.
        wide = torch.where(wide * 2 == wanted_wide, wanted_wide, wide)
        torch.testing.assert_close(wide, wanted_wide, rtol=0.13, atol=0.002)  # one step of e4m3


def test_fp8_refuses_scales_of_no_known_shape(randoms: Randoms) -> None:
    weight = randoms(256, 256).to(reference.FP8)
    with pytest.raises(ValueError, match=r"\[1\], \[256\] or \[2, 2\], not \[3\]"):
        linear_fp8(randoms(1, 256), weight, randoms(3), None)


def packed_words(values: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """int64[.., 8 W] as int32[.., W]."""
    words = torch.zeros((*values.shape[:-1], values.shape[-1] // 8), dtype=torch.int64)
    for place, column in enumerate(order):
        words |= values.cpu().unflatten(-1, (-1, 8))[..., column] << 4 * place
    return words.to(torch.int32).to(values.device)  # wraps around


def int4_weight(
    randoms: Randoms, layout: str, shape: tuple[int, int], group: int
) -> tuple[Int4Weight, torch.Tensor]:
    """A random matrix, and the same in float32[N, K]. layout: also "act", GPTQ with act-order."""
    width, inner = shape
    values = randoms.integers(0, 16, inner, width)
    zeros = randoms.integers(0, 15, inner // group, width)
    scales = randoms(inner // group, width).abs()
    groups = torch.arange(inner, device=values.device) // group
    if layout == "act":
        groups = groups[randoms(inner).argsort()]
    offset = 0 if layout == "awq" else 1
    dense = ((values - zeros[groups] - offset) * scales[groups]).T
    if layout == "awq":
        words = packed_words(values, AWQ_ORDER), packed_words(zeros, AWQ_ORDER)
        return Int4Weight("awq", *words, scales, group), dense
    plain = tuple(range(8))
    words = packed_words(values.T, plain).T.contiguous(), packed_words(zeros, plain)
    g_idx = groups.int() if layout == "act" else None
    return Int4Weight("gptq", *words, scales, group, offset, g_idx), dense


@pytest.mark.parametrize("layout", ["gptq", "act", "awq"])
def test_int4_layouts(randoms: Randoms, layout: str) -> None:
    for dtype, (rows, inner, width) in zip(
        DTYPES, [(1, 64, 8), (5, 224, 72), (66, 96, 72)], strict=True
    ):
        weight, dense = int4_weight(randoms, layout, (width, inner), 32)
        assert weight.shape == (width, inner)
        torch.testing.assert_close(weight.dequantise(), dense)
        x, bias = randoms(rows, inner, dtype=dtype), randoms(width, dtype=dtype)
        got = linear_int4(x, weight, bias)
        near(got, reference.linear_int4(x.float(), weight, bias.float()))


def test_splits_are_cut_by_the_weight_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "_SHORTEST_SPLIT", 1024)
    assert product.num_splits(4096, 14336, 64) == 5
    assert product.num_splits(128256, 4096, 64) == 1
    assert product.num_splits(64, 512, 64) == 1
    for steps in range(1, 100):  # none is empty
        splits = product.num_splits(64, 1024 * steps, 1024)
        assert (splits - 1) * -(-steps // splits) < steps


def test_row_tiles(randoms: Randoms) -> None:
    for num_rows, num_groups, height in [(50, 7, 4), (3, 60, 16), (1, 1, 1), (40, 2, 16)]:
        groups = randoms.integers(-1, num_groups + 1, num_rows).int()
        tiles = RowTiles.of(groups, num_groups, height)
        seen: list[int] = []
        for group, start, end in zip(tiles.groups, tiles.starts, tiles.ends, strict=True):
            if group < num_groups:
                rows = tiles.order[start:end].tolist()
                assert 0 < len(rows) <= height and bool((groups[rows] == group).all())
                seen += rows
        wanted = ((groups >= 0) & (groups < num_groups)).nonzero().flatten().tolist()
        assert sorted(seen) == wanted


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grouped_linear(randoms: Randoms, dtype: torch.dtype) -> None:
    weights, x = randoms(5, 70, 100, dtype=dtype), randoms(20, 100, dtype=dtype)
    groups = randoms.integers(-1, 5, 40).int()
    out = torch.full((40, 70), 7.0, device=x.device)
    got = grouped_linear(x, weights, RowTiles.of(groups, 5, 16), out=out.clone())
    for row, group in enumerate(groups.tolist()):
        dense = weights[group].float() @ x[row // 2].float() if group >= 0 else out[row]
        near(got[row].to(dtype), dense)


@pytest.mark.parametrize("renormalise", [True, False])
def test_route(randoms: Randoms, renormalise: bool) -> None:
    logits = randoms(33, 60)
    logits[3] = 1.0  # equals: the first ones
    logits[4, 7] = float("-inf")
    experts, weights = route(logits, 4, renormalise)
    wanted, wanted_weights = reference.route(logits, 4, renormalise)
    assert torch.equal(experts, wanted)
    torch.testing.assert_close(weights, wanted_weights)
    with pytest.raises(ValueError, match="not 61 of 60"):
        route(logits, 61, renormalise)


@pytest.mark.parametrize("dtype", SOME_DTYPES, ids=str)
def test_mixture_of_experts(randoms: Randoms, dtype: torch.dtype) -> None:
    x = randoms(37, 64, dtype=dtype)
    gate_up, down = randoms(8, 96, 64, dtype=dtype) / 8, randoms(8, 64, 48, dtype=dtype) / 8
    experts, weights = reference.route(randoms(37, 8), 2, True)
    experts[5, 1], experts[6] = -1, 8  # another rank's
    got = moe_mlp(x, experts, weights, gate_up, down)
    wide = [tensor.float() for tensor in (gate_up, down)]
    near(got, reference.moe_mlp(x.float(), experts, weights, *wide))
    assert not got[6].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adapters(randoms: Randoms, dtype: torch.dtype) -> None:
    x, y = randoms(21, 64, dtype=dtype), randoms(21, 40, dtype=dtype)
    a, b = randoms(3, 8, 64, dtype=dtype), randoms(3, 40, 8, dtype=dtype)
    slots, scaling = randoms.integers(-1, 3, 21).int(), randoms(3).abs()
    got = add_lora(y.clone(), x, slots, a, b, scaling)
    wide = [tensor.float() for tensor in (x, a, b)]
    near(got, reference.add_lora(y.float(), wide[0], slots, *wide[1:], scaling))
    assert torch.equal(got[slots < 0], y[slots < 0])


def test_the_reference_s_mixture_is_a_dense_mlp_of_one_expert(randoms: Randoms) -> None:
    x, gate_up, down = randoms(4, 16), randoms(1, 24, 16), randoms(1, 16, 12)
    gate, up = (x @ gate_up[0].T).chunk(2, -1)
    wanted = (F.silu(gate) * up) @ down[0].T
    experts = torch.zeros((4, 1), dtype=torch.int32, device=x.device)
    got = reference.moe_mlp(x, experts, torch.ones_like(experts).float(), gate_up, down)
    torch.testing.assert_close(got, wanted)
