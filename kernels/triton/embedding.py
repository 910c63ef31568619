"""Rows of a vocabulary table, one per token; zeros for tokens that another rank holds.

Shapes: ids int64[T], weight[V, N] -> [T, N]. dtypes: weight and result each float32, bfloat16 or
float16. Bytes moved: the rows read and the rows written. It computes nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from headgate.kernels import reference
from headgate.kernels.triton.launch import launch

_BLOCK = 1024


@triton.jit(do_not_specialize=["first_id", "num_ids"])
def embedding_kernel(
    out_ptr,
    ids_ptr,
    weight_ptr,
    first_id,
    num_ids,
    stride,  # at least WIDTH
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    local = tl.load(ids_ptr + token) - first_id
    inside = columns < WIDTH
    place = local * stride + columns
    held = inside & (place >= 0) & (place < num_ids * stride)
    values = tl.load(weight_ptr + place, held, 0.0)
    tl.store(out_ptr + token * WIDTH + columns, values.to(out_ptr.dtype.element_ty), inside)


def embedding(
    ids: torch.Tensor, weight: torch.Tensor, first_id: int, dtype: torch.dtype
) -> torch.Tensor:
    num_ids, width = weight.shape
    if ids.dim() != 1 or ids.dtype != torch.int64 or weight.stride(1) != 1:
        return reference.embedding(ids, weight, first_id, dtype)
    out = torch.empty((ids.shape[0], width), dtype=dtype, device=weight.device)
    launch(
        embedding_kernel,
        (ids.shape[0], triton.cdiv(width, _BLOCK)),
        (out, ids.contiguous(), weight, first_id, num_ids, weight.stride(0)),
        {"WIDTH": width, "BLOCK": _BLOCK},
        warps=4,
    )
    return out
