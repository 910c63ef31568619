"""Stores a step's keys and values in the paged cache, where no rotation comes before.

Shapes, dtypes and slots as in `rotary.py`. Bytes moved: k and v read and written once; it computes
next to nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from headgate.kernels import reference
from headgate.kernels.int8_cache import Int8Cache, PagedCache
from headgate.kernels.triton.launch import launch
from headgate.kernels.triton.narrow import (
    largest_of,
    limit_of,
    narrowed,
    parts_of,
    quantised,
    scale_of,
)

_PROGRAM = 1024  # elements of k, and as many of v


@triton.jit(do_not_specialize=["num_rows"])
def write_kv_kernel(
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    k_scales_ptr,  # with INT8
    v_scales_ptr,
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
    BLOCK_SIZE: tl.constexpr,
    LIMIT: tl.constexpr,
    INT8: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token, head = rows // KV_HEADS, rows % KV_HEADS
    slot = tl.load(slots_ptr + token, rows < num_rows, -1)
    dims = tl.arange(0, DIM_BLOCK)[None, :]
    inside = (slot >= 0)[:, None] & (dims < DIM)
    place = (slot * (KV_HEADS * DIM) + head * DIM)[:, None] + dims
    kept: tl.constexpr = k_cache_ptr.dtype.element_ty
    k = tl.load(k_ptr + (token * k_stride + head * k_head_stride)[:, None] + dims, inside, 0.0)
    v = tl.load(v_ptr + (token * v_stride + head * v_head_stride)[:, None] + dims, inside, 0.0)
    if INT8:
        of = (slot // BLOCK_SIZE * KV_HEADS + head) * BLOCK_SIZE + slot % BLOCK_SIZE
        scale, inverse = scale_of(largest_of(k))
        tl.store(k_scales_ptr + of, scale, slot >= 0)
        tl.store(k_cache_ptr + place, quantised(k, inverse), inside)
        scale, inverse = scale_of(largest_of(v))
        tl.store(v_scales_ptr + of, scale, slot >= 0)
        tl.store(v_cache_ptr + place, quantised(v, inverse), inside)
    else:
        tl.store(k_cache_ptr + place, narrowed(k, LIMIT, kept), inside)
        tl.store(v_cache_ptr + place, narrowed(v, LIMIT, kept), inside)


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: PagedCache,
    v_cache: PagedCache,
    slot_mapping: torch.Tensor,
) -> None:
    contiguous = k_cache.is_contiguous() and v_cache.is_contiguous()
    if not contiguous or k.stride(2) != 1 or v.stride(2) != 1:
        reference.write_kv(k, v, k_cache, v_cache, slot_mapping)
        return
    tokens, kv_heads, dim = k.shape
    dim_block = triton.next_power_of_2(dim)
    rows = max(1, _PROGRAM // dim_block)
    (keys, k_scales), (values, v_scales) = parts_of(k_cache), parts_of(v_cache)
    strides = (x.stride(axis) for x in (k, v) for axis in (0, 1))
    launch(
        write_kv_kernel,
        (triton.cdiv(tokens * kv_heads, rows),),
        (k, v, keys, values, k_scales, v_scales, slot_mapping, tokens * kv_heads, *strides),
        {
            "KV_HEADS": kv_heads,
            "ROWS": rows,
            "DIM": dim,
            "DIM_BLOCK": dim_block,
            "BLOCK_SIZE": k_cache.shape[1],
            "LIMIT": limit_of(k_cache),
            "INT8": isinstance(k_cache, Int8Cache),
        },
        warps=4,
    )
