"""Products with packed weights, and what may come right before one, in the pass over its inputs.

A row has the same bits in any batch, and those that the separate operations give it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from headgate.kernels import reference
from headgate.kernels.cpu.calls import allocate, call
from headgate.kernels.cpu.packed import DTYPES, PackedWeight
from headgate.kernels.cpu.quantised import QuantisedWeight
from headgate.kernels.cpu.rows import as_matrix, is_rows
from headgate.kernels.quantised import QuantisedTensor
from headgate.kernels.reference import RoundedTensor

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
    weight: PackedWeight | QuantisedWeight,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As in ops. Raises ValueError."""
    for rows in (x,) if residual is None else (x, residual):
        _check_rows("rms_norm_linear", rows, weight.inner)
    if not (is_rows(norm) and norm.shape == (weight.inner,)):
        raise ValueError(f"rms_norm_linear's norm must be float32[{weight.inner}]")
    if residual is None:
        return _multiply(x, weight, bias, _Before(norm, eps)), x
    if residual.shape != x.shape:
        raise ValueError(f"a residual {tuple(residual.shape)} for {tuple(x.shape)}")
    total = allocate(x.shape)
    before = _Before(norm, eps, as_matrix(residual), total)
    return _multiply(x, weight, bias, before), total


def gated_linear(
    x: torch.Tensor,
    activation: str,
    weight: PackedWeight | QuantisedWeight,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """As in ops. Raises ValueError."""
    _check_rows("gated_linear", x, 2 * weight.inner)
    return _multiply(x, weight, bias, _Before(activation=ACTIVATIONS[activation]))


def _check_rows(operation: str, x: torch.Tensor, size: int) -> None:
    if not is_rows(x) or x.shape[-1] != size:
        raise ValueError(
            f"{operation} takes float32 rows of {size}, not {x.dtype} {tuple(x.shape)}"
        )


def _multiply(
    x: torch.Tensor,
    weight: PackedWeight | QuantisedWeight,
    bias: torch.Tensor | None,
    before: _Before,
) -> torch.Tensor:
    if bias is not None and not (is_rows(bias) and bias.shape == (weight.columns,)):
        raise ValueError(f"linear's bias must be float32[{weight.columns}]")
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
        _address(before.norm),
        before.eps,
        _address(before.residual),
        0 if before.residual is None else before.residual.stride(0),
        _address(before.total),
        before.activation,
    )
    return out


def _address(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
