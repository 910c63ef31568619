"""RMSNorm of rows, with or without adding them to a residual first (Zhang and Sennrich, 2019).

Shapes: x[..., N] -> [..., N]; the rows may be apart by two strides, as heads of a fused projection
are. dtypes: float32, bfloat16, float16; the mean of squares is float32. Bytes moved: 2 rows of N
(plain), 4 (with residual), and the weight once per program, from the caches. Operations: about 4N
a row, so it runs at the speed of memory.

With a residual x may be parts[W, rows, N], the ranks' shares of a sum, which are added first, in
order and rounded each time as W - 1 additions would: 3 + W rows of N are moved instead of 4 + 3W.

A row is one program's, whole: its bits depend on nothing else.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from headgate.kernels import reference
from headgate.kernels.triton.launch import launch

_MAX_WIDTH = 65536  # a row must fit a program's registers
_PROGRAM = 1024  # elements that are worth a program: shorter rows share one


@triton.jit(do_not_specialize=["num_rows", "part_rows"])
def rms_norm_kernel(
    out_ptr,
    x_ptr,
    residual_ptr,
    weight_ptr,
    num_rows,
    inner,  # rows that lie `inner_stride` apart before the next `outer_stride`
    outer_stride,
    inner_stride,
    out_stride,
    residual_stride,
    part_rows,  # from one part of x to the next, as rows `outer_stride` apart
    eps,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PARTS: tl.constexpr,  # of x
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
    places = (rows // inner).to(tl.int64) * outer_stride + (rows % inner) * inner_stride
    x = tl.load(x_ptr + places[:, None] + columns[None, :], inside, 0.0)
    for part in tl.static_range(1, PARTS):
        beyond = x_ptr + part_rows.to(tl.int64) * part * outer_stride
        more = tl.load(beyond + places[:, None] + columns[None, :], inside, 0.0)
        x = (x.to(tl.float32) + more.to(tl.float32)).to(x.dtype)
    if RESIDUAL:
        at = rows.to(tl.int64)[:, None] * residual_stride + columns[None, :]
        total = x.to(tl.float32) + tl.load(residual_ptr + at, inside, 0.0).to(tl.float32)
        x = total.to(x.dtype)
        tl.store(residual_ptr + at, x, inside)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 1) / WIDTH + eps)
    normed = (wide * scale[:, None]).to(x.dtype).to(tl.float32)
    weight = tl.load(weight_ptr + columns, columns < WIDTH, 0.0).to(tl.float32)
    at = rows.to(tl.int64)[:, None] * out_stride + columns[None, :]
    tl.store(out_ptr + at, (normed * weight[None, :]).to(out_ptr.dtype.element_ty), inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    width = x.shape[-1]
    if width > _MAX_WIDTH or x.stride(-1) != 1 or weight.dtype != x.dtype:
        return reference.rms_norm(x, weight, eps)
    if x.dim() == 3:
        inner, outer_stride, inner_stride = x.shape[1], x.stride(0), x.stride(1)
    else:
        x = x if x.dim() == 2 else x.reshape(-1, width)
        inner, outer_stride, inner_stride = 1, x.stride(0), 0
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(out, x, None, weight, (inner, outer_stride, inner_stride), eps)
    return out


def rms_norm_residual(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the reference; the sum replaces `residual`, and the norm `x`, or its first part."""
    parts = x if x.dim() == 3 else x.unsqueeze(0)
    first = parts[0] if len(parts) else x
    rows = first.dim() == 2 and first.shape == residual.shape
    plain = x.dtype == residual.dtype == weight.dtype and x.stride(-1) == residual.stride(-1) == 1
    plain = plain and parts.stride(0) % max(1, first.stride(0)) == 0
    if not (rows and plain) or x.shape[-1] > _MAX_WIDTH:
        return reference.rms_norm_residual(x, residual, weight, eps)
    _launch(first, parts, residual, weight, (1, first.stride(0), 0), eps)
    return first, residual


def _launch(
    out: torch.Tensor,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    layout: tuple[int, int, int],
    eps: float,
) -> None:
    width = x.shape[-1]
    num_rows = out.numel() // width if width else 0
    columns = triton.next_power_of_2(width)
    rows = max(1, _PROGRAM // columns)
    launch(
        rms_norm_kernel,
        (triton.cdiv(num_rows, rows),),
        (
            out,
            x,
            x if residual is None else residual,
            weight,
            num_rows,
            *layout,
            out.stride(0) if out.dim() == 2 else width,
            0 if residual is None else residual.stride(0),
            0 if residual is None else x.stride(0) // max(1, out.stride(0)),
            eps,
        ),
        {
            "WIDTH": width,
            "COLUMNS": columns,
            "ROWS": rows,
            "RESIDUAL": residual is not None,
            "PARTS": 1 if residual is None else len(x),
        },
        warps=min(16, max(1, columns * rows // 512)),
    )
