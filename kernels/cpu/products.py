"""Products with packed weights, and what may come right before one, in the pass over its inputs.

A row has the same bits in any batch, and those that the separate operations give it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from headgate.kernels import reference
from headgate.kernels.cpu import library
from headgate.kernels.cpu.calls import allocate, call
from headgate.kernels.cpu.packed import DTYPES, PackedWeight
from headgate.kernels.cpu.quantised import QuantisedWeight
from headgate.kernels.cpu.rows import as_matrix, is_rows
from headgate.kernels.quantised import QuantisedTensor
from headgate.kernels.reference import RoundedTensor

Weight = PackedWeight | QuantisedWeight

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2}  # as in kernels.h
_NO_ACTIVATION = -1


@dataclass(frozen=True, slots=True)
class _Before:
    """What rows go through before the product; RowSource in kernels.h."""

    norm: torch.Tensor | None = None
    eps: float = 0.0
    residual: torch.Tensor | None = None
    total: torch.Tensor | None = None
    activation: int = _NO_ACTIVATION

    def norm_arguments(self) -> tuple[int | None, float, int | None, int, int | None]:
        """Of the norm and its residual, as the C++ takes them."""
        stride = 0 if self.residual is None else self.residual.stride(0)
        addresses = [_address(rows) for rows in (self.norm, self.residual, self.total)]
        return addresses[0], self.eps, addresses[1], stride, addresses[2]


_NOTHING = _Before()


def pack_linear(
    weight: torch.Tensor, dtype: torch.dtype, quantize: str = "", precision: str = "highest"
) -> torch.Tensor | QuantisedTensor | RoundedTensor | PackedWeight | QuantisedWeight:
    """weight[N, K], rounded to `dtype` or quantised, in the layout that `linear` reads fastest."""
    if quantize:
        return QuantisedWeight(weight, quantize)
    if dtype in DTYPES:
        return PackedWeight(weight, dtype, precision)
    return reference.pack_linear(weight, dtype, quantize, precision)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor | QuantisedTensor | RoundedTensor | PackedWeight | QuantisedWeight,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """As the reference."""
    if not isinstance(weight, (PackedWeight, QuantisedWeight)):
        return reference.linear(x, weight, bias)
    _check_rows("linear", x, weight.inner)
    return _multiply(x, weight, bias, _NOTHING)


def rms_norm_linear(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    norm: torch.Tensor,
    eps: float,
    weight: Weight,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As in ops. Raises ValueError."""
    before = _norm_before(x, residual, norm, eps, weight)
    product = _multiply(x, weight, bias, before)
    return product, x if before.total is None else before.total


def gated_linear(
    x: torch.Tensor,
    activation: str,
    weight: Weight,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """`linear` of activation(gate) * up of x = [gate, up]. Raises ValueError."""
    _check_rows("gated_linear", x, 2 * weight.inner)
    return _multiply(x, weight, bias, _Before(activation=ACTIVATIONS[activation]))


def gated_mlp(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    norm: torch.Tensor,
    eps: float,
    gate_up: tuple[Weight, torch.Tensor | None],
    activation: str,
    down: tuple[Weight, torch.Tensor | None],
) -> tuple[torch.Tensor, torch.Tensor]:
    """As in ops. Raises ValueError."""
    first, second = gate_up[0], down[0]
    if first.columns != 2 * second.inner:
        raise ValueError(
            f"gated_mlp takes gate and up of {2 * second.inner} columns, not {first.columns}"
        )
    if not _is_one_call(first, second):
        both, total = rms_norm_linear(x, residual, norm, eps, *gate_up)
        return gated_linear(both, activation, *down), total
    before = _norm_before(x, residual, norm, eps, first)
    _check_bias(*gate_up)
    _check_bias(*down)
    rows = as_matrix(x)
    out = allocate((*x.shape[:-1], second.columns))
    call(
        first.gated_mlp,
        rows.data_ptr(),
        rows.shape[0],
        first.inner,
        rows.stride(0),
        *before.norm_arguments(),
        first.address,
        first.code,
        second.inner,
        _address(gate_up[1]),
        ACTIVATIONS[activation],
        second.address,
        second.columns,
        _address(down[1]),
        out.data_ptr(),
        second.columns,
    )
    return out, x if before.total is None else before.total


def _is_one_call(first: Weight, second: Weight) -> bool:
    """Whether the C++ has both products of an MLP as one: of weights of one kind, and whole blocks
    of columns between."""
    loaded = library.load()
    assert loaded is not None
    alike = first.gated_mlp == second.gated_mlp and first.code == second.code
    return alike and second.inner % loaded.hg_gated_columns() == 0


def _norm_before(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    norm: torch.Tensor,
    eps: float,
    weight: Weight,
) -> _Before:
    """The norm of x + residual before a product, checked. Raises ValueError."""
    for rows in (x,) if residual is None else (x, residual):
        _check_rows("rms_norm_linear", rows, weight.inner)
    if not (is_rows(norm) and norm.shape == (weight.inner,)):
        raise ValueError(f"rms_norm_linear's norm must be float32[{weight.inner}]")
    if residual is None:
        return _Before(norm, eps)
    if residual.shape != x.shape:
        raise ValueError(f"a residual {tuple(residual.shape)} for {tuple(x.shape)}")
    return _Before(norm, eps, as_matrix(residual), allocate(x.shape))


def _check_bias(weight: Weight, bias: torch.Tensor | None) -> None:
    if bias is not None and not (is_rows(bias) and bias.shape == (weight.columns,)):
        raise ValueError(f"linear's bias must be float32[{weight.columns}]")


def _check_rows(operation: str, x: torch.Tensor, size: int) -> None:
    if not is_rows(x) or x.shape[-1] != size:
        raise ValueError(
            f"{operation} takes float32 rows of {size}, not {x.dtype} {tuple(x.shape)}"
        )


def _multiply(
    x: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    before: _Before,
) -> torch.Tensor:
    _check_bias(weight, bias)
    rows = as_matrix(x)
    out = allocate((*x.shape[:-1], weight.columns))
    call(
        weight.function,
        rows.data_ptr(),
        rows.shape[0],
        weight.inner,
        rows.stride(0),
        weight.address,
        weight.code,
        weight.columns,
        _address(bias),
        out.data_ptr(),
        weight.columns,
        *before.norm_arguments(),
        before.activation,
    )
    return out


def _address(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
