"""LayerNorm of rows (Ba, Kiros and Hinton, 2016).

Shapes: x[..., N] -> [..., N], weight[N], bias[N] or none. dtypes: float32, bfloat16, float16; mean
and variance are float32, the variance from the centred values. Bytes moved: 2 rows of N, the weight
and bias from the caches. Operations: about 6N a row, so it runs at the speed of memory.

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


@triton.jit(do_not_specialize=["num_rows"])
def layer_norm_kernel(
    out_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    num_rows,
    stride,
    eps,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BIAS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    wanted = columns < WIDTH
    inside = (rows < num_rows)[:, None] & wanted[None, :]
    at = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    x = tl.load(x_ptr + at, inside, 0.0).to(tl.float32)
    centred = tl.where(wanted[None, :], x - (tl.sum(x, 1) / WIDTH)[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 1) / WIDTH + eps)
    out = centred * scale[:, None] * tl.load(weight_ptr + columns, wanted, 0.0).to(tl.float32)
    if BIAS:
        out += tl.load(bias_ptr + columns, wanted, 0.0).to(tl.float32)
    at = rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), inside)


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    width = x.shape[-1]
    if width > _MAX_WIDTH or x.stride(-1) != 1:
        return reference.layer_norm(x, weight, bias, eps)
    lines = x if x.dim() == 2 else x.reshape(-1, width)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    columns = triton.next_power_of_2(width)
    rows = max(1, _PROGRAM // columns)
    launch(
        layer_norm_kernel,
        (triton.cdiv(lines.shape[0], rows),),
        (
            out,
            lines,
            weight,
            weight if bias is None else bias,
            lines.shape[0],
            lines.stride(0),
            eps,
        ),
        {"WIDTH": width, "COLUMNS": columns, "ROWS": rows, "BIAS": bias is not None},
        warps=min(16, max(1, columns * rows // 512)),
    )
    return out
