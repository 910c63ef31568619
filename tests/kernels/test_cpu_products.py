"""What comes right before a product, as one operation with it: the bits of the separate ones."""

from __future__ import annotations

import itertools
from typing import get_args

import pytest
import torch

from headgate.kernels import ops
from headgate.kernels.cpu import operations, products, set_num_threads
from headgate.quant_kinds import KINDS

pytestmark = pytest.mark.usefixtures("cpu_kernels")

# Weights as pack_linear is asked for them: dtype, kind, precision.
WEIGHTS = {
    "float32": (torch.float32, "", "highest"),
    "bfloat16": (torch.bfloat16, "", "highest"),
    "float16": (torch.float16, "", "highest"),
    "rounded inputs": (torch.bfloat16, "", "medium"),
    **{kind: (torch.float32, kind, "highest") for kind in KINDS},
}
EPS = 1e-5


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pack(columns: int, inner: int, name: str) -> products.PackedWeight | products.QuantisedWeight:
    packed = operations.pack_linear(random(columns, inner), *WEIGHTS[name])
    assert isinstance(packed, (products.PackedWeight, products.QuantisedWeight))
    return packed


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("inner", [576, 70, 1])
def test_norm_and_product(name: str, inner: int) -> None:
    weight, norm, bias = pack(100, inner, name), random(inner, seed=1), random(100, seed=2)
    for rows in (1, 2, 5, 12, 13, 40):
        x, residual = random(rows, inner, seed=3), random(rows, inner, seed=4) * 8
        for threads in (1, 2, 5):
            set_num_threads(threads)
            normed, total = operations.rms_norm_residual(x, residual, norm, EPS)
            expected = operations.linear(normed, weight, bias), total
            got = operations.rms_norm_linear(x, residual, norm, EPS, weight, bias)
            assert all(map(torch.equal, got, expected))
            expected = operations.linear(operations.rms_norm(x, norm, EPS), weight, bias), x
            got = operations.rms_norm_linear(x, None, norm, EPS, weight, bias)
            assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("activation", products.ACTIVATIONS)
def test_gate_and_product(name: str, activation: ops.Activation) -> None:
    for inner in (300, 3):
        weight, bias = pack(70, inner, name), random(70, seed=2)
        for rows in (1, 3, 12, 40):
            x = random(rows, 2 * inner, seed=3) * 4
            if activation == "silu":
                gated = operations.silu_and_mul(x)
            else:
                gated = operations.gelu_and_mul(x, activation == "gelu_tanh")
            got = products.gated_linear(x, activation, weight, bias)
            assert torch.equal(got, operations.linear(gated, weight, bias))


def separate_mlp(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    norm: torch.Tensor,
    gate_up: tuple[products.Weight, torch.Tensor | None],
    activation: ops.Activation,
    down: tuple[products.Weight, torch.Tensor | None],
) -> tuple[torch.Tensor, torch.Tensor]:
    both, total = operations.rms_norm_linear(x, residual, norm, EPS, *gate_up)
    return products.gated_linear(both, activation, *down), total


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("middle", [64, 320])
def test_gated_mlp(name: str, middle: int) -> None:
    """Both products at once, of rows in one home, in several, and of more than wait at a time."""
    norm = random(130, seed=1)
    gate_up = pack(2 * middle, 130, name), random(2 * middle, seed=5)
    down = pack(100, middle, name), random(100, seed=6)
    for rows, threads in itertools.product((1, 2, 5, 13, 40, 101, 1300), (1, 2, 5)):
        x, residual = random(rows, 130, seed=2), random(rows, 130, seed=3)
        set_num_threads(threads)
        expected = separate_mlp(x, residual, norm, gate_up, "silu", down)
        got = operations.gated_mlp(x, residual, norm, EPS, gate_up, "silu", down)
        assert all(map(torch.equal, got, expected)), (rows, threads)


@pytest.mark.parametrize("activation", products.ACTIVATIONS)
@pytest.mark.parametrize("middle", [3, 96, 128])
def test_gated_mlp_of_any_size_and_of_different_weights(
    activation: ops.Activation, middle: int
) -> None:
    x, norm = random(40, 50, seed=2)[:, 3:45], random(42, seed=1)
    for first, second in (("bfloat16", "bfloat16"), ("bfloat16", "int8"), ("int4", "int8")):
        gate_up, down = (pack(2 * middle, 42, first), None), (pack(20, middle, second), None)
        expected = separate_mlp(x, None, norm, gate_up, activation, down)
        got = operations.gated_mlp(x, None, norm, EPS, gate_up, activation, down)
        assert all(map(torch.equal, got, expected)), (first, second)
    none = operations.gated_mlp(x[:0], None, norm, EPS, gate_up, activation, down)
    assert none[0].shape == (0, 20)


@pytest.mark.parametrize("name", ["bfloat16", "int8"])
def test_wide_rows_shared_by_many_threads(name: str) -> None:
    """Few rows, whose columns are cut into parts, the norm's sums made for each."""
    weight, norm = pack(64, 9000, name), random(9000, seed=1)
    for rows in (3, 12, 14):
        x, residual = random(rows, 9000, seed=2), random(rows, 9000, seed=3)
        set_num_threads(1)
        expected = operations.rms_norm_linear(x, residual, norm, EPS, weight, None)
        set_num_threads(4)
        for _ in range(20):
            got = operations.rms_norm_linear(x, residual, norm, EPS, weight, None)
            assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("columns", [20, 300])
def test_rows_that_each_thread_has_its_part_of(name: str, columns: int) -> None:
    """So many that they are cut into homes, of one panel of weights or of several."""
    weight, norm = pack(columns, 130, name), random(130, seed=1)
    for rows in (64, 101, 400):
        x, residual = random(rows, 130, seed=2), random(rows, 130, seed=3)
        set_num_threads(1)
        expected = operations.rms_norm_linear(x, residual, norm, EPS, weight, None)
        first = operations.rms_norm_linear(x[:1], residual[:1], norm, EPS, weight, None)
        assert torch.equal(expected[0][:1], first[0])
        for threads in (2, 3, 8):
            set_num_threads(threads)
            for _ in range(5):
                got = operations.rms_norm_linear(x, residual, norm, EPS, weight, None)
                assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("name", ["bfloat16", "int8"])
def test_a_product_of_no_columns_leaves_the_sum(name: str) -> None:
    weight, norm = pack(0, 130, name), random(130, seed=1)
    x, residual = random(40, 130, seed=2), random(40, 130, seed=3)
    got, total = operations.rms_norm_linear(x, residual, norm, EPS, weight, None)
    assert got.shape == (40, 0)
    assert torch.equal(total, x + residual)


def test_rows_with_strides_and_more_dimensions() -> None:
    weight, norm = pack(40, 16, "bfloat16"), random(16, seed=1)
    x, residual = random(6, 50, seed=2)[:, 10:26], random(6, 30, seed=3)[:, 3:19]
    got = operations.rms_norm_linear(x, residual, norm, EPS, weight, None)
    apart = operations.rms_norm_linear(
        x.reshape(2, 3, 16), residual.reshape(2, 3, 16), norm, EPS, weight, None
    )
    assert all(map(torch.equal, got, (apart[0].view(6, 40), apart[1].view(6, 16))))
    wide = random(6, 50, seed=2)[:, 7:39]
    gated = products.gated_linear(wide, "silu", weight, None)
    assert torch.equal(gated, products.gated_linear(wide.contiguous(), "silu", weight, None))
    assert products.gated_linear(wide[:0], "silu", weight, None).shape == (0, 40)


def test_what_would_be_read_wrongly_is_refused() -> None:
    weight, norm = pack(4, 8, "float32"), random(8)
    for x in (random(2, 7), random(2, 8).double(), random(8, 2).T):
        with pytest.raises(ValueError, match="float32 rows of 8"):
            operations.rms_norm_linear(x, None, norm, EPS, weight, None)
        with pytest.raises(ValueError, match="float32 rows of 8"):
            operations.rms_norm_linear(random(2, 8), x, norm, EPS, weight, None)
    with pytest.raises(ValueError, match="residual"):
        operations.rms_norm_linear(random(2, 8), random(3, 8), norm, EPS, weight, None)
    with pytest.raises(ValueError, match="norm"):
        operations.rms_norm_linear(random(2, 8), None, random(7), EPS, weight, None)
    with pytest.raises(ValueError, match="gate and up of 16 columns, not 4"):
        operations.gated_mlp(random(2, 8), None, norm, EPS, (weight, None), "silu", (weight, None))
    with pytest.raises(ValueError, match="float32 rows of 16"):
        products.gated_linear(random(2, 8), "silu", weight, None)


def test_other_back_ends_put_them_together_from_their_operations() -> None:
    before = ops.active()
    weight, norm, bias = random(128, 8), random(8, seed=1), random(128, seed=5)
    down = random(5, 64, seed=4)
    x, residual = random(3, 8, seed=2), random(3, 8, seed=3)
    packed = operations.pack_linear(weight, torch.float32)
    packed_down = operations.pack_linear(down, torch.float32)
    try:
        results = []
        for name, form, second in (("reference", weight, down), ("cpu", packed, packed_down)):
            ops.use(name)
            found = [
                *ops.rms_norm_linear(x.clone(), residual.clone(), norm, EPS, form),
                *ops.rms_norm_linear(x.clone(), None, norm, EPS, form),
            ]
            for activation in get_args(ops.Activation):
                both = (x.clone(), residual.clone(), norm, EPS)
                found += ops.gated_mlp(*both, (form, bias), activation, (second, None))
            results.append(found)
        torch.testing.assert_close(*results)
    finally:
        ops.use(before)
