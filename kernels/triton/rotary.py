"""Rotary position embedding (Su et al., 2021), alone and with the write of K and V into the cache.

Shapes: q[T, H, D], k, v[T, K, D], positions int64[T], cos_sin float32[P, r], caches
[blocks, block_size, K, D], slots int64[T]. q, k and v may be views with strides. dtypes: q, k, v
float32, bfloat16 or float16; caches any of these, or float8_e4m3fn / float8_e5m2, or an Int8Cache;
values are cut to the range of float16 and float8 before they are rounded. Bytes moved: q, k and v
read and written once, r float32 a token. Operations: 6 for each pair rotated, so it runs at the
speed of memory.

One program has one token, and no token has an influence on another. Slots below zero are skipped:
they are what pads a CUDA graph's batch.
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
from headgate.kernels.triton.rms_norm import rms_norm


@triton.jit
def _rotated(x_ptr, inside, far, cos, sin):
    """(first, second) of each pair (i, i + far), turned; float32."""
    first = tl.load(x_ptr, inside, 0.0).to(tl.float32)
    second = tl.load(x_ptr + far, inside, 0.0).to(tl.float32)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def rotary_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    positions_ptr,
    cos_sin_ptr,
    k_cache_ptr,
    v_cache_ptr,
    k_scales_ptr,  # with INT8
    v_scales_ptr,
    slots_ptr,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    CACHE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LIMIT: tl.constexpr,
    INT8: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, HALF_BLOCK)
    table = cos_sin_ptr + tl.load(positions_ptr + token) * (2 * HALF)
    cos = tl.load(table + pair, pair < HALF, 0.0)[None, :]
    sin = tl.load(table + HALF + pair, pair < HALF, 0.0)[None, :]

    heads = tl.arange(0, HEAD_BLOCK)[:, None]
    inside = (heads < HEADS) & (pair < HALF)[None, :]
    at = q_ptr + token * q_stride + heads * q_head_stride + pair[None, :]
    first, second = _rotated(at, inside, HALF, cos, sin)
    tl.store(at, first.to(q_ptr.dtype.element_ty), inside)
    tl.store(at + HALF, second.to(q_ptr.dtype.element_ty), inside)

    heads = tl.arange(0, KV_BLOCK)[:, None]
    inside = (heads < KV_HEADS) & (pair < HALF)[None, :]
    at = k_ptr + token * k_stride + heads * k_head_stride + pair[None, :]
    first, second = _rotated(at, inside, HALF, cos, sin)
    first, second = first.to(k_ptr.dtype.element_ty), second.to(k_ptr.dtype.element_ty)
    if not CACHE:
        tl.store(at, first, inside)
        tl.store(at + HALF, second, inside)
    else:
        slot = tl.load(slots_ptr + token)
        if slot >= 0:
            kept: tl.constexpr = k_cache_ptr.dtype.element_ty
            dims = tl.arange(0, DIM_BLOCK)[None, :]
            place = slot * (KV_HEADS * DIM) + heads * DIM
            to = k_cache_ptr + place + pair[None, :]
            whole = (heads < KV_HEADS) & (dims < DIM)
            rest = whole & (dims >= 2 * HALF)  # what is not rotated
            v = tl.load(v_ptr + token * v_stride + heads * v_head_stride + dims, whole, 0.0)
            if DIM > 2 * HALF:
                unturned = k_ptr + token * k_stride + heads * k_head_stride + dims
                others = tl.load(unturned, rest, 0.0)
            if INT8:
                head = tl.arange(0, KV_BLOCK)
                of = (slot // BLOCK_SIZE * KV_HEADS + head) * BLOCK_SIZE + slot % BLOCK_SIZE
                largest = tl.maximum(largest_of(first), largest_of(second), tl.PropagateNan.ALL)
                if DIM > 2 * HALF:
                    largest = tl.maximum(largest, largest_of(others), tl.PropagateNan.ALL)
                scale, inverse = scale_of(largest)
                tl.store(k_scales_ptr + of, scale, head < KV_HEADS)
                tl.store(to, quantised(first, inverse), inside)
                tl.store(to + HALF, quantised(second, inverse), inside)
                if DIM > 2 * HALF:
                    tl.store(k_cache_ptr + place + dims, quantised(others, inverse), rest)
                scale, inverse = scale_of(largest_of(v))
                tl.store(v_scales_ptr + of, scale, head < KV_HEADS)
                tl.store(v_cache_ptr + place + dims, quantised(v, inverse), whole)
            else:
                tl.store(to, narrowed(first, LIMIT, kept), inside)
                tl.store(to + HALF, narrowed(second, LIMIT, kept), inside)
                if DIM > 2 * HALF:
                    tl.store(k_cache_ptr + place + dims, narrowed(others, LIMIT, kept), rest)
                tl.store(v_cache_ptr + place + dims, narrowed(v, LIMIT, kept), whole)


def rotary_embedding(
    q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the reference, in place."""
    if not _takes(q, k, k, cos_sin):
        return reference.rotary_embedding(q, k, positions, cos_sin)
    _launch(q, k, None, positions, cos_sin, None)
    return q, k


def rotary_and_write_kv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    k_cache: PagedCache,
    v_cache: PagedCache,
    slot_mapping: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor, float] | None = None,
) -> torch.Tensor:
    """As the reference; q is rotated in place, k goes to the cache only."""
    if norms is not None:
        q, k = rms_norm(q, norms[0], norms[2]), rms_norm(k, norms[1], norms[2])
    caches = (k_cache, v_cache, slot_mapping)
    if not (_takes(q, k, v, cos_sin) and k_cache.is_contiguous() and v_cache.is_contiguous()):
        return reference.rotary_and_write_kv(q, k, v, positions, cos_sin, *caches)
    _launch(q, k, v, positions, cos_sin, caches)
    return q


def _takes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos_sin: torch.Tensor) -> bool:
    return (
        q.dtype == k.dtype == v.dtype
        and q.stride(2) == k.stride(2) == v.stride(2) == 1
        and cos_sin.is_contiguous()
        and cos_sin.dtype == torch.float32
    )


def _launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    caches: tuple[PagedCache, PagedCache, torch.Tensor] | None,
) -> None:
    v = k if v is None else v
    tokens, heads, dim = q.shape
    kv_heads, half = k.shape[1], cos_sin.shape[1] // 2
    k_cache, v_cache, slots = caches or (k, k, positions)
    (keys, k_scales), (values, v_scales) = parts_of(k_cache), parts_of(v_cache)
    strides = (x.stride(axis) for x in (q, k, v) for axis in (0, 1))
    launch(
        rotary_kernel,
        (tokens,),
        (q, k, v, positions, cos_sin, keys, values, k_scales, v_scales, slots, *strides),
        {
            "HEADS": heads,
            "KV_HEADS": kv_heads,
            "HEAD_BLOCK": triton.next_power_of_2(heads),
            "KV_BLOCK": triton.next_power_of_2(kv_heads),
            "DIM": dim,
            "DIM_BLOCK": triton.next_power_of_2(dim),
            "HALF": half,
            "HALF_BLOCK": triton.next_power_of_2(half),
            "CACHE": caches is not None,
            "BLOCK_SIZE": k_cache.shape[1],
            "LIMIT": limit_of(k_cache),
            "INT8": isinstance(k_cache, Int8Cache),
        },
        warps=4,
    )
