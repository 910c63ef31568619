"""Quantised linear layers in C++: against the reference, and the bits of each row."""

from __future__ import annotations

import pytest
import torch

from headgate import quant_kinds
from headgate.kernels import reference
from headgate.kernels.cpu import library, operations, set_num_threads
from headgate.kernels.cpu.quantised import CODES, QuantisedWeight
from headgate.kernels.quantised import quantise
from headgate.launcher.autosize import _QUANTISED_BYTES

pytestmark = pytest.mark.usefixtures("cpu_kernels")

KINDS = list(quant_kinds.KINDS)
SIZES = [(96, 128), (70, 100), (33, 577), (5, 1030), (1, 1)]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pack(weight: torch.Tensor, kind: str) -> QuantisedWeight:
    packed = operations.pack_linear(weight, torch.float32, kind)
    assert isinstance(packed, QuantisedWeight)
    return packed


def test_every_kind_has_a_code() -> None:
    assert CODES.keys() == quant_kinds.KINDS.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_what_the_launcher_counts(kind: str) -> None:
    per_weight = quant_kinds.KINDS[kind].bytes_per_weight
    of_channel = {"int8": 2, "int4": 4}.get(kind, 0)  # its scale or unit
    assert pack(random(64, 128), kind).nbytes == 64 * 128 * per_weight + 64 * of_channel
    assert 0.89 * _QUANTISED_BYTES[kind] < per_weight <= _QUANTISED_BYTES[kind]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_quantised_as_by_the_reference(kind: str, dtype: torch.dtype) -> None:
    """Seen by inputs with a single value each, whose products are exact."""
    weight = random(70, 333) * random(70, 1, seed=1).exp() + random(70, 333, seed=2) ** 7
    weight[3] = 0.0
    weight[4, 32:64] = weight[4, 31]  # a group of equals
    weight[5] = torch.linspace(-2e-38, 2e-38, 333)
    weight[6], weight[7] = weight[6].abs() + 1, -weight[7].abs() - 1
    given = weight.to(dtype)
    x = 127 * torch.eye(333)
    expected = reference.linear(x, reference.pack_linear(given, torch.float32, kind), None)
    packed = operations.pack_linear(given, torch.float32, kind)
    assert torch.equal(operations.linear(x, packed, None), expected)


def test_scales_and_minima_of_int4_are_bytes_of_their_channel() -> None:
    weight = random(50, 320) * random(50, 1, seed=1).exp()
    weight[3], weight[4] = weight[3].abs() + 1, -weight[4].abs() - 1
    weight[5, 40:] *= 1e-4  # groups far smaller than others
    quantised = quantise(weight, quant_kinds.KINDS["int4"])
    assert quantised.minima is not None and (quantised.minima <= 0).all()
    scales, minima = quantised.scales.float(), quantised.minima.float() / -8
    largest = torch.maximum(scales, minima).amax(1, keepdim=True)
    unit = 2.0 ** largest.log2().floor() / 128
    for stored, least in ((scales, 1), (minima, 0)):
        numbers = stored / unit
        assert torch.equal(numbers, numbers.round())
        assert numbers.min() >= least and numbers.max() <= 255
    error = (quantised.dequantise() - weight).norm(dim=1) / weight.norm(dim=1)
    assert error.max() < 0.09


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_linear(kind: str, size: tuple[int, int]) -> None:
    columns, inner = size
    weight, bias = random(columns, inner), random(columns, seed=1)
    packed, expected = pack(weight, kind), reference.pack_linear(weight, torch.float32, kind)
    for rows in (1, 2, 4, 5, 6, 7, 12, 13, 29):
        # Rows and columns of very different sizes, as behind an MLP's gate.
        x = random(rows, inner, seed=rows) * torch.logspace(-3, 3, inner) * random(rows, 1, seed=3)
        want = reference.linear(x, expected, None)
        got = operations.linear(x, packed, None)
        scale = float(want.abs().max()) * 1e-6 + 1e-9
        torch.testing.assert_close(got, want, rtol=1e-5, atol=scale)
        with_bias = operations.linear(x, packed, bias)
        torch.testing.assert_close(with_bias, got + bias, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_bits_in_any_batch_and_on_any_number_of_threads(kind: str) -> None:
    packed, x = pack(random(500, 600), kind), random(67, 600, seed=1)
    whole = operations.linear(x, packed, None)
    for rows in (1, 2, 3, 4, 8, 11, 12, 13, 40):
        for first in (0, 20):
            part = operations.linear(x[first : first + rows], packed, None)
            assert torch.equal(part, whole[first : first + rows])
    for threads in (1, 3, 8):
        set_num_threads(threads)
        assert torch.equal(operations.linear(x, packed, None), whole)
        assert torch.equal(operations.linear(x[5:6], packed, None), whole[5:6])


@pytest.mark.parametrize("kind", KINDS)
def test_instruction_sets_with_fused_sums_agree(kind: str) -> None:
    packed, x = pack(random(100, 513), kind), random(40, 513, seed=1)
    loaded = library.load()
    assert loaded is not None
    results = []
    for name in (b"avx2", b"avx512"):
        if loaded.hg_init(name):
            results.append(operations.linear(x, packed, None))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_sums_of_the_largest_values_are_exact(kind: str) -> None:
    """A product of bytes that saturates, as AVX2's does, would be far off here."""
    inner = 4 * quant_kinds.KINDS[kind].group
    for sign in (1.0, -1.0):
        weight = torch.full((40, inner), sign)
        if kind == "int4":
            weight[:, ::32] = 0.0  # so that the others are 15
        x = torch.full((5, inner), -3.0)
        packed, expected = pack(weight, kind), reference.pack_linear(weight, torch.float32, kind)
        got = operations.linear(x, packed, None)
        torch.testing.assert_close(got, reference.linear(x, expected, None), rtol=1e-6, atol=0)
        torch.testing.assert_close(got, x @ weight.T, rtol=1e-2, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_and_the_smallest_inputs(kind: str) -> None:
    packed = pack(random(40, 70), kind)
    x = torch.zeros(3, 70)
    x[1] = 1e-38
    x[2, 5] = 1e30
    out = operations.linear(x, packed, None)
    assert torch.equal(out[0], torch.zeros(40)) and out[1].abs().max() < 1e-35
    assert out[2].isfinite().all()


def test_linear_refuses_what_would_be_read_wrongly() -> None:
    packed = pack(random(4, 8), "int8")
    for x in (random(2, 7), random(2, 8).double(), random(8, 2).T):
        with pytest.raises(ValueError, match="float32 rows of 8"):
            operations.linear(x, packed, None)


def test_rows_with_strides_and_more_dimensions() -> None:
    for kind in KINDS:
        packed, x = pack(random(40, 16), kind), random(6, 50, seed=1)
        part = x[:, 10:26]
        expected = operations.linear(part.contiguous(), packed, None)
        assert torch.equal(operations.linear(part, packed, None), expected)
        folded = operations.linear(part.contiguous().view(2, 3, 16), packed, None)
        assert torch.equal(folded, expected.view(2, 3, 40))
        assert operations.linear(x[:0, :16], packed, None).shape == (0, 40)
