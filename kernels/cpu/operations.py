"""The operations as Python functions over tensors: checks what the C++ takes, allocates, calls.

What a call means is said in `headgate.kernels.reference`, which also does whatever the C++ does not
take: other dtypes, odd strides, head dims above 256. The GIL is free during a call. All calls go
through `calls.call` and all results are `calls.allocate`d, so that a step can be recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from headgate.kernels import reference
from headgate.kernels.cpu import library
from headgate.kernels.cpu.calls import allocate, call
from headgate.kernels.cpu.packed import DTYPES
from headgate.kernels.cpu.products import (
    ACTIVATIONS,
    gated_mlp,
    linear,
    pack_linear,
    rms_norm_linear,
)
from headgate.kernels.cpu.rows import as_matrix, is_rows
from headgate.kernels.cpu.shortlist import linear_largest, make_shortlist
from headgate.kernels.int8_cache import Int8Cache, PagedCache
from headgate.kernels.philox import Draw

if TYPE_CHECKING:
    from headgate.kernels.ops import Ranks
    from headgate.shard.attention_metadata import AttentionMetadata

_MAX_HEAD_DIM = 256
_SCALED_BYTES = 5  # kScaledBytes of kernels.h


def embedding(
    ids: torch.Tensor, weight: torch.Tensor, first_id: int, dtype: torch.dtype
) -> torch.Tensor:
    code = DTYPES.get(weight.dtype)
    plain = ids.dtype == torch.int64 and ids.is_contiguous() and weight.is_contiguous()
    if code is None or not plain or dtype != torch.float32:
        return reference.embedding(ids, weight, first_id, dtype)
    rows, size = weight.shape
    out = allocate((*ids.shape, size))
    call(
        "hg_embedding",
        ids.data_ptr(),
        ids.numel(),
        weight.data_ptr(),
        code,
        rows,
        size,
        first_id,
        out.data_ptr(),
    )
    return out


def take_rows(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    plain = indices.dtype == torch.int64 and indices.is_contiguous() and x.dim() == 2
    if not (plain and is_rows(x)):
        return reference.take_rows(x, indices)
    out = allocate((len(indices), x.shape[1]))
    call(
        "hg_take_rows",
        x.data_ptr(),
        x.stride(0),
        indices.data_ptr(),
        len(indices),
        x.shape[1],
        out.data_ptr(),
    )
    return out


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    if not (is_rows(x) and is_rows(weight)):
        return reference.rms_norm(x, weight, eps)
    rows = as_matrix(x)
    out = allocate(x.shape)
    call(
        "hg_rms_norm",
        rows.data_ptr(),
        rows.stride(0),
        None,
        0,
        weight.data_ptr(),
        out.data_ptr(),
        None,
        rows.shape[0],
        rows.shape[1],
        eps,
    )
    return out


def rms_norm_residual(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    if not (is_rows(x) and is_rows(residual) and is_rows(weight)):
        return reference.rms_norm_residual(x, residual, weight, eps)
    rows, residual_rows = as_matrix(x), as_matrix(residual)
    out = allocate(x.shape)
    total = allocate(x.shape)
    call(
        "hg_rms_norm",
        rows.data_ptr(),
        rows.stride(0),
        residual_rows.data_ptr(),
        residual_rows.stride(0),
        weight.data_ptr(),
        out.data_ptr(),
        total.data_ptr(),
        rows.shape[0],
        rows.shape[1],
        eps,
    )
    return out, total


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    return _gate(x, "silu") if is_rows(x) else reference.silu_and_mul(x)


def gelu_and_mul(x: torch.Tensor, tanh: bool) -> torch.Tensor:
    if not is_rows(x):
        return reference.gelu_and_mul(x, tanh)
    return _gate(x, "gelu_tanh" if tanh else "gelu")


def _gate(x: torch.Tensor, activation: str) -> torch.Tensor:
    rows = as_matrix(x)
    size = x.shape[-1] // 2
    out = allocate((*x.shape[:-1], size))
    call(
        "hg_gate",
        rows.data_ptr(),
        rows.stride(0),
        out.data_ptr(),
        rows.shape[0],
        size,
        ACTIVATIONS[activation],
    )
    return out


def rotary_embedding(
    q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """In place."""
    whole = cos_sin.is_contiguous() and positions.is_contiguous()
    if not (whole and all(map(is_rows, (q, k, cos_sin))) and positions.dtype == torch.int64):
        return reference.rotary_embedding(q, k, positions, cos_sin)
    call(
        "hg_rotary",
        q.data_ptr(),
        q.stride(0),
        q.stride(1),
        k.data_ptr(),
        k.stride(0),
        k.stride(1),
        positions.data_ptr(),
        cos_sin.data_ptr(),
        positions.shape[0],
        q.shape[1],
        k.shape[1],
        cos_sin.shape[1],
    )
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
    """In place."""
    caches = _caches(k_cache, v_cache)
    indices, weights = (positions, slot_mapping), norms[:2] if norms else ()
    plain = all(index.is_contiguous() and index.dtype == torch.int64 for index in indices)
    rows = all(map(is_rows, (q, k, v, cos_sin, *weights))) and cos_sin.is_contiguous()
    if caches is None or not (plain and rows):
        return reference.rotary_and_write_kv(
            q, k, v, positions, cos_sin, k_cache, v_cache, slot_mapping, norms
        )
    call(
        "hg_rotary_and_write_kv",
        q.data_ptr(),
        q.stride(0),
        q.stride(1),
        k.data_ptr(),
        k.stride(0),
        k.stride(1),
        v.data_ptr(),
        v.stride(0),
        v.stride(1),
        norms[0].data_ptr() if norms else None,
        norms[1].data_ptr() if norms else None,
        norms[2] if norms else 0.0,
        positions.data_ptr(),
        cos_sin.data_ptr(),
        cos_sin.shape[1],
        *caches,
        slot_mapping.data_ptr(),
        len(q),
        q.shape[1],
        k.shape[1],
        k.shape[2],
    )
    return q


def _caches(k_cache: PagedCache, v_cache: PagedCache) -> tuple[int | None, ...] | None:
    """What the C++ takes for a layer's caches (library.py); None where it takes no such caches."""
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        return None
    block_size = k_cache.shape[1]
    if isinstance(k_cache, Int8Cache) and isinstance(v_cache, Int8Cache):
        tensors = (k_cache.values, v_cache.values, k_cache.scales, v_cache.scales)
        return *(tensor.data_ptr() for tensor in tensors), _SCALED_BYTES, block_size
    if isinstance(k_cache, Int8Cache) or isinstance(v_cache, Int8Cache):
        return None
    code = DTYPES.get(k_cache.dtype)
    if code is None or k_cache.dtype != v_cache.dtype:
        return None
    return k_cache.data_ptr(), v_cache.data_ptr(), None, None, code, block_size


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: PagedCache,
    v_cache: PagedCache,
    slot_mapping: torch.Tensor,
) -> None:
    caches = _caches(k_cache, v_cache)
    plain = slot_mapping.is_contiguous() and slot_mapping.dtype == torch.int64
    if caches is None or not (plain and is_rows(k) and is_rows(v)):
        reference.write_kv(k, v, k_cache, v_cache, slot_mapping)
        return
    call(
        "hg_write_kv",
        k.data_ptr(),
        k.stride(0),
        k.stride(1),
        v.data_ptr(),
        v.stride(0),
        v.stride(1),
        *caches,
        slot_mapping.data_ptr(),
        slot_mapping.shape[0],
        k.shape[1],
        k.shape[2],
    )


def paged_attention(
    q: torch.Tensor,
    k_cache: PagedCache,
    v_cache: PagedCache,
    attention: AttentionMetadata,
    scale: float,
    window: int,
    soft_cap: float,
    alibi_slopes: torch.Tensor | None = None,
    rounded: bool = False,
) -> torch.Tensor:
    caches = _caches(k_cache, v_cache)
    _, heads, dim = q.shape
    tables = attention.block_tables
    plain = tables.stride(-1) == 1 and tables.dtype == torch.int32
    taken = plain and is_rows(q) and dim <= _MAX_HEAD_DIM and alibi_slopes is None
    if caches is None or not taken:
        return reference.paged_attention(
            q, k_cache, v_cache, attention, scale, window, soft_cap, alibi_slopes, rounded
        )
    out = allocate(q.shape)
    call(
        "hg_paged_attention",
        q.data_ptr(),
        q.stride(0),
        q.stride(1),
        *caches,
        attention.cu_query_lens.data_ptr(),
        attention.context_lens.data_ptr(),
        tables.data_ptr(),
        tables.stride(0),
        tables.shape[0],
        heads,
        k_cache.shape[2],
        dim,
        scale,
        window,
        soft_cap,
        rounded,
        out.data_ptr(),
    )
    return out


def argmax(scores: torch.Tensor) -> npt.NDArray[np.int64]:
    if scores.dtype != torch.float32 or not scores.is_contiguous() or not scores.numel():
        return reference.argmax(scores)
    rows, size = scores.shape
    found = np.empty(rows, np.int64)
    call("hg_argmax", scores.data_ptr(), rows, size, found.ctypes.data)
    return found


def likeliest_tokens(
    logits: torch.Tensor, first_id: int, wanted: int, ranks: Ranks
) -> torch.Tensor:
    """As in ops."""
    rows, size = logits.shape
    keys, tokens = (allocate(shape, torch.int64) for shape in ((rows, ranks.world_size), (rows,)))
    call(
        "hg_likeliest_keys",
        logits.data_ptr(),
        rows,
        size,
        first_id,
        wanted,
        keys.data_ptr(),
        ranks.rank,
        ranks.world_size,
    )
    keys = ranks.all_reduce(keys)
    call("hg_likeliest", keys.data_ptr(), rows, ranks.world_size, wanted, tokens.data_ptr())
    return tokens


def gumbel_argmax(
    scores: npt.NDArray[np.float32], best: float, temperature: float, draw: Draw
) -> int:
    if not scores.flags.c_contiguous:
        return reference.gumbel_argmax(scores, best, temperature, draw)
    loaded = library.load()
    assert loaded is not None, "asked for without available()"
    return loaded.hg_gumbel_argmax(
        scores.ctypes.data,
        len(scores),
        best,
        temperature,
        draw.seed,
        draw.output_position,
        draw.sample_index,
    )


OPS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        embedding,
        take_rows,
        linear,
        pack_linear,
        rms_norm_linear,
        gated_mlp,
        make_shortlist,
        linear_largest,
        rms_norm,
        rms_norm_residual,
        silu_and_mul,
        gelu_and_mul,
        rotary_embedding,
        rotary_and_write_kv,
        write_kv,
        argmax,
        likeliest_tokens,
        gumbel_argmax,
        paged_attention,
    )
}
