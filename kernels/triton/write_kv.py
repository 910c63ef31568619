"""Stores a step's keys and values in the paged cache, where no rotation comes before.

Shapes, dtypes and slots as in `rotary.py`. Bytes moved: k and v read and written once; it computes
nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from headgate.kernels import reference
from headgate.kernels.triton.launch import launch
from headgate.kernels.triton.rotary import limit_of, narrowed

_PROGRAM = 1024  # elements of k, and as many of v


@triton.jit(do_not_specialize=["num_rows"])
def write_kv_kernel(
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slots_ptr,
    num_rows,  # tokens x heads
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    KV_HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    LIMIT: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token, head = rows // KV_HEADS, rows % KV_HEADS
    slot = tl.load(slots_ptr + token, rows < num_rows, -1)
    dims = tl.arange(0, DIM_BLOCK)[None, :]
    inside = (slot >= 0)[:, None] & (dims < DIM)
    place = (slot * (KV_HEADS * DIM) + head * DIM)[:, None] + dims
    kept: tl.constexpr = k_cache_ptr.dtype.element_ty
    x = tl.load(k_ptr + (token * k_stride + head * k_head_stride)[:, None] + dims, inside, 0.0)
    tl.store(k_cache_ptr + place, narrowed(x, LIMIT, kept), inside)
    x = tl.load(v_ptr + (token * v_stride + head * v_head_stride)[:, None] + dims, inside, 0.0)
    tl.store(v_cache_ptr + place, narrowed(x, LIMIT, kept), inside)


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    contiguous = k_cache.is_contiguous() and v_cache.is_contiguous()
    if not contiguous or k.stride(2) != 1 or v.stride(2) != 1:
        reference.write_kv(k, v, k_cache, v_cache, slot_mapping)
        return
    tokens, kv_heads, dim = k.shape
    dim_block = triton.next_power_of_2(dim)
    rows = max(1, _PROGRAM // dim_block)
    strides = (x.stride(axis) for x in (k, v) for axis in (0, 1))
    launch(
        write_kv_kernel,
        (triton.cdiv(tokens * kv_heads, rows),),
        (k, v, k_cache, v_cache, slot_mapping, tokens * kv_heads, *strides),
        {
            "KV_HEADS": kv_heads,
            "ROWS": rows,
            "DIM": dim,
            "DIM_BLOCK": dim_block,
            "LIMIT": limit_of(k_cache, k),
        },
        warps=4,
    )
