"""Causal attention of a step's tokens over the paged KV of their own rows.

FlashAttention-2's online softmax (Dao, 2023) over chunks of any length without padding, and
flash-decoding's split over the keys with a reduction afterwards (Dao et al., 2023), in one kernel.

Shapes: q[T, H, D], caches [blocks, block_size, K, D] -> [T, H, D]; D up to 256, any block size, H a
multiple of K. dtypes: q float32, bfloat16 or float16; caches any of these or float8_e4m3fn /
float8_e5m2, which are widened to q's, or an Int8Cache. Of that, keys go to the tensor cores as the
whole numbers they are, which every dtype of q holds, and their scales multiply the scores: less to
multiply, and nothing is rounded. Values are scaled before they are multiplied: their scales may be
too small for weights in float16. Scores and sums are float32, weights of values are rounded to q's
dtype for the tensor cores. Kinds: sliding window, soft cap (Gemma 2), ALiBi (Press et al.,
2021). Bytes moved: each row's keys and values once per tile of queries (all heads of a group and,
in a chunk, `rows` / (H/K) tokens share a tile), q and the result once; where keys are split, one
partial result of D + 2 float32 per token, head and 512 keys is written and read. Operations: 4 D
for each pair of query and visible key.

Exactness: keys are cut at fixed positions, every `PARTITION`; a partition's partial result starts
from nothing, and partial results are merged in ascending order by the same formula, whether one
program meets them all one by one (chunks) or many programs do and a second kernel merges
(decoding). So a token's bits depend neither on the other rows nor on the way its prompt was
chunked, and the choice between the two, which is by number of tokens, is one of speed only.
Partitions and blocks a token sees nothing of change nothing: they add exact zeros. What this costs:
a second accumulator, hence tiles of 64 rows per four warps. It rests on the tensor cores summing a
row's product in the same way in tiles of any height that use the same instruction, which
tests/kernels checks on a GPU; the tiles of each chip are chosen so (`_tile`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from headgate.kernels import reference
from headgate.kernels.int8_cache import Int8Cache, PagedCache
from headgate.kernels.triton.launch import INTERPRETED, chip, dot, launch
from headgate.kernels.triton.narrow import parts_of
from headgate.kernels.triton.tuning import AttentionTile, tuned

if TYPE_CHECKING:
    from headgate.shard.attention_metadata import AttentionMetadata

PARTITION = 512  # keys; the unit of the split, part of what results depend on
_MAX_HEAD_DIM = 256
_MMA_SYNC = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_120")  # whose products take 16 rows
_WORKSPACE = 32 << 20  # bytes that partial results may take
_LOG2_E = tl.constexpr(1.4426950408889634)  # weights are powers of two


@triton.jit
def _last_at_most(values_ptr, count, target, DIVISOR: tl.constexpr, STEP: tl.constexpr):
    """Largest row whose values[row] // DIVISOR + row * STEP is at most `target`; by bisection."""
    low, high = 0, count
    while high - low > 1:
        middle = (low + high) // 2
        reached = tl.load(values_ptr + middle) // DIVISOR + middle * STEP <= target
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle)
    return low


@triton.jit
def _merged(top, total, out, part_top, part_total, part):
    """Two partial results as one. Explicit fused multiply-adds: what the compiler would contract
    could differ between kernels."""
    new = tl.maximum(top, part_top)
    safe = tl.where(new == float("-inf"), 0.0, new)
    old_share, new_share = tl.exp2(top - safe), tl.exp2(part_top - safe)
    total = tl.fma(part_total, new_share, total * old_share)
    share = tl.broadcast_to(new_share[:, None], part.shape)
    return new, total, tl.fma(part, share, out * old_share[:, None])


@triton.jit(do_not_specialize=["num_rows", "num_tokens", "table_stride"])
def attention_kernel(
    out_ptr,  # the result, or with SPLIT float32[splits, T, H, D]
    tops_ptr,  # with SPLIT float32[splits, T, H]: largest scores
    totals_ptr,  # and sums of weights
    q_ptr,
    k_ptr,
    v_ptr,
    k_scales_ptr,  # with INT8
    v_scales_ptr,
    slopes_ptr,
    starts_ptr,
    contexts_ptr,
    tables_ptr,
    num_rows,
    num_tokens,
    q_stride,
    q_head_stride,
    table_stride,
    scale,
    soft_cap,
    window,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PARTITION: tl.constexpr,
    ROWS: tl.constexpr,  # of the tile: tokens x heads of the group
    KEYS: tl.constexpr,
    SPLIT: tl.constexpr,
    DECODE: tl.constexpr,  # every row has one token
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    ALIBI: tl.constexpr,
    INT8: tl.constexpr,
):
    GROUP: tl.constexpr = HEADS // KV_HEADS
    TOKENS: tl.constexpr = ROWS // GROUP
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    if DECODE:
        row = tile
    else:
        # Row r's tiles begin at starts[r] // TOKENS + r: room for all its tokens, no table needed.
        row = _last_at_most(starts_ptr, num_rows, tile, TOKENS, 1)
    start = tl.load(starts_ptr + row)
    count = tl.load(starts_ptr + row + 1) - start
    context = tl.load(contexts_ptr + row)
    first = 0
    if not DECODE:
        first = (tile - start // TOKENS - row) * TOKENS
    if first >= count:
        return
    before = context - count  # positions computed in earlier steps
    end = before + tl.minimum(first + TOKENS, count)
    begin = 0
    if WINDOW:
        begin = tl.maximum(before + first - window + 1, 0)
    first_part = begin // PARTITION
    last_part = (end + PARTITION - 1) // PARTITION
    if SPLIT:
        only = tl.program_id(2)
        if (only < first_part) | (only >= last_part):
            return
        first_part = only
        last_part = only + 1

    lanes = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM_BLOCK)
    token = first + lanes // GROUP
    head = kv_head * GROUP + lanes % GROUP
    valid = (lanes < TOKENS * GROUP) & (token < count)
    position = before + token
    place = (start + token).to(tl.int64)
    wanted = valid[:, None] & (dims < DIM)[None, :]
    at = place * q_stride + head * q_head_stride
    q = tl.load(q_ptr + at[:, None] + dims[None, :], wanted, 0.0)
    if ALIBI:
        slope = tl.load(slopes_ptr + head, valid, 0.0).to(tl.float32)

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.full([ROWS], 0.0, tl.float32)
    out = tl.full([ROWS, DIM_BLOCK], 0.0, tl.float32)
    for part in range(first_part, last_part):
        part_top = tl.full([ROWS], float("-inf"), tl.float32)
        part_total = tl.full([ROWS], 0.0, tl.float32)
        part_out = tl.full([ROWS, DIM_BLOCK], 0.0, tl.float32)
        low = tl.maximum(part * PARTITION, begin // KEYS * KEYS)
        high = tl.minimum((part + 1) * PARTITION, end)
        for key_start in range(low, high, KEYS):
            key = key_start + tl.arange(0, KEYS)
            there = key < end
            block = tl.load(tables_ptr + row * table_stride + key // BLOCK_SIZE, there, 0)
            slot = block.to(tl.int64) * BLOCK_SIZE + key % BLOCK_SIZE
            kv_at = (slot * (KV_HEADS * DIM) + kv_head * DIM)[:, None] + dims[None, :]
            inside = there[:, None] & (dims < DIM)[None, :]
            k = tl.load(k_ptr + kv_at, inside, 0.0)
            if INT8 and INTERPRETED:  # which has no way from whole numbers to bfloat16
                k = k.to(tl.float32)
            k = k.to(q.dtype)
            scores = dot(q, tl.trans(k), tl.full([ROWS, KEYS], 0.0, tl.float32))
            if INT8:
                scale_at = (block * KV_HEADS + kv_head) * BLOCK_SIZE + key % BLOCK_SIZE
                scores *= tl.load(k_scales_ptr + scale_at, there, 0.0)[None, :]
            scores *= scale
            if SOFT_CAP:  # cap * tanh(x / cap), tanh(y) = 1 - 2 / (1 + exp(2 y))
                scores = soft_cap * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * scores / soft_cap)))
            if ALIBI:
                scores += slope[:, None] * (key[None, :] - position[:, None]).to(tl.float32)
            visible = key[None, :] <= position[:, None]
            if WINDOW:
                visible &= key[None, :] > position[:, None] - window
            scores = tl.where(visible, scores * _LOG2_E, float("-inf"))
            new = tl.maximum(part_top, tl.max(scores, 1))
            safe = tl.where(new == float("-inf"), 0.0, new)
            weights = tl.exp2(scores - safe[:, None])
            share = tl.exp2(part_top - safe)
            part_total = tl.fma(part_total, share, tl.sum(weights, 1))
            v = tl.load(v_ptr + kv_at, inside, 0.0)
            if INT8:
                v = v.to(tl.float32) * tl.load(v_scales_ptr + scale_at, there, 0.0)[:, None]
            v = v.to(q.dtype)
            part_out = dot(weights.to(q.dtype), v, part_out * share[:, None])
            part_top = new
        if SPLIT:
            top, total, out = part_top, part_total, part_out
        else:
            top, total, out = _merged(top, total, out, part_top, part_total, part_out)

    if SPLIT:
        split = tl.program_id(2).to(tl.int64) * num_tokens
        at = (split + place) * HEADS + head
        tl.store(tops_ptr + at, top, valid)
        tl.store(totals_ptr + at, total, valid)
    else:
        at = place * HEADS + head
        out = out / total[:, None]
    result = out.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at[:, None] * DIM + dims[None, :], result, wanted)


@triton.jit(do_not_specialize=["num_rows", "num_tokens"])
def merge_kernel(
    out_ptr,
    parts_ptr,
    tops_ptr,
    totals_ptr,
    starts_ptr,
    contexts_ptr,
    num_rows,
    num_tokens,
    window,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    PARTITION: tl.constexpr,
    DECODE: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """One token's partial results in ascending order, the heads of a group in one program."""
    token = tl.program_id(0)
    lanes = tl.arange(0, HEAD_BLOCK)
    there = lanes < GROUP
    head = tl.program_id(1) * GROUP + lanes
    if DECODE:
        row = token
    else:
        row = _last_at_most(starts_ptr, num_rows, token, 1, 0)
    last = tl.load(starts_ptr + row + 1)
    if token >= last:
        return
    end = tl.load(contexts_ptr + row) - (last - token) + 1
    begin = 0
    if WINDOW:
        begin = tl.maximum(end - window, 0)
    dims = tl.arange(0, DIM_BLOCK)
    wanted = there[:, None] & (dims < DIM)[None, :]
    top = tl.full([HEAD_BLOCK], float("-inf"), tl.float32)
    total = tl.full([HEAD_BLOCK], 0.0, tl.float32)
    out = tl.full([HEAD_BLOCK, DIM_BLOCK], 0.0, tl.float32)
    plane = num_tokens.to(tl.int64) * HEADS
    for part in range(begin // PARTITION, (end + PARTITION - 1) // PARTITION):
        at = part * plane + token * HEADS + head
        part_top = tl.load(tops_ptr + at, there, 0.0)
        part_total = tl.load(totals_ptr + at, there, 1.0)
        part_out = tl.load(parts_ptr + at[:, None] * DIM + dims[None, :], wanted, 0.0)
        top, total, out = _merged(top, total, out, part_top, part_total, part_out)
    out = (out / total[:, None]).to(out_ptr.dtype.element_ty)
    at = token.to(tl.int64) * HEADS + head
    tl.store(out_ptr + at[:, None] * DIM + dims[None, :], out, wanted)


def paged_attention(
    q: torch.Tensor,
    k_cache: PagedCache,
    v_cache: PagedCache,
    attention: AttentionMetadata,
    scale: float,
    window: int,
    soft_cap: float,
    alibi_slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    if not _takes(q, k_cache, v_cache):
        return reference.paged_attention(
            q, k_cache, v_cache, attention, scale, window, soft_cap, alibi_slopes
        )
    tokens, heads, dim = q.shape
    out = torch.empty((tokens, heads, dim), dtype=q.dtype, device=q.device)
    if not tokens:
        return out
    kinds = {"WINDOW": window > 0, "SOFT_CAP": soft_cap > 0, "ALIBI": alibi_slopes is not None}
    slopes = attention.context_lens if alibi_slopes is None else alibi_slopes
    call = (q, k_cache, v_cache, slopes, attention, scale, soft_cap, window)
    splits = triton.cdiv(attention.max_context_len, PARTITION)
    if splits == 1 or splits * tokens * heads * (dim + 2) * 4 > _WORKSPACE:
        _attend(out, None, call, 1, kinds)
        return out
    shape = (splits, tokens, heads)
    parts, tops, totals = (
        torch.empty((*shape, *more), dtype=torch.float32, device=q.device)
        for more in ((dim,), (), ())
    )
    _attend(parts, (tops, totals), call, splits, kinds)
    starts, contexts = attention.cu_query_lens, attention.context_lens
    kv_heads = k_cache.shape[2]
    launch(
        merge_kernel,
        (tokens, kv_heads),
        (out, parts, tops, totals, starts, contexts, contexts.shape[0], tokens, window),
        {
            "HEADS": heads,
            "GROUP": heads // kv_heads,
            "HEAD_BLOCK": triton.next_power_of_2(heads // kv_heads),
            "DIM": dim,
            "DIM_BLOCK": triton.next_power_of_2(dim),
            "PARTITION": PARTITION,
            "DECODE": attention.max_query_len == 1 and contexts.shape[0] == tokens,
            "WINDOW": window > 0,
        },
        warps=1,
    )
    return out


def _takes(q: torch.Tensor, k_cache: PagedCache, v_cache: PagedCache) -> bool:
    whole = k_cache.is_contiguous() and v_cache.is_contiguous() and q.stride(2) == 1
    return whole and q.shape[2] <= _MAX_HEAD_DIM and q.shape[1] // k_cache.shape[2] <= 64


def _attend(
    out: torch.Tensor,
    sums: tuple[torch.Tensor, torch.Tensor] | None,
    call: tuple,
    splits: int,
    kinds: dict[str, bool],
) -> None:
    """One launch of the main kernel; `sums`: where partial results' tops and totals go."""
    q, k_cache, v_cache, slopes, attention, scale, soft_cap, window = call
    tokens, heads, dim = q.shape
    block_size, kv_heads = k_cache.shape[1:3]
    rows = attention.context_lens.shape[0]
    decode = attention.max_query_len == 1 and rows == tokens
    int8 = isinstance(k_cache, Int8Cache)
    tile = _tile(q.dtype, heads // kv_heads, dim, int8)
    tile_rows, warps = (tile.decode_rows, tile.decode_warps) if decode else (tile.rows, tile.warps)
    tiles = rows if decode else tokens // (tile_rows // (heads // kv_heads)) + rows
    tables = attention.block_tables
    (keys, k_scales), (values, v_scales) = parts_of(k_cache), parts_of(v_cache)
    launch(
        attention_kernel,
        (tiles, kv_heads, splits),
        (
            out,
            *(sums or (out, out)),
            q,
            keys,
            values,
            k_scales,
            v_scales,
            slopes,
            attention.cu_query_lens,
            attention.context_lens,
            tables,
            rows,
            tokens,
            q.stride(0),
            q.stride(1),
            tables.stride(0),
            scale,
            soft_cap,
            window,
        ),
        {
            "HEADS": heads,
            "KV_HEADS": kv_heads,
            "DIM": dim,
            "DIM_BLOCK": max(16, triton.next_power_of_2(dim)),
            "BLOCK_SIZE": block_size,
            "PARTITION": PARTITION,
            "ROWS": tile_rows,
            "KEYS": tile.keys,
            "SPLIT": sums is not None,
            "DECODE": decode,
            "INT8": int8,
            **kinds,
        },
        warps=warps,
        stages=tile.stages,
    )


def _tile(dtype: torch.dtype, group: int, dim: int, int8: bool) -> AttentionTile:
    """The same for any number of tokens but for the height, which does not reach the bits: within a
    chip both heights use the same instruction (mma.sync takes 16 rows, wgmma 64 for four warps).
    int8 keys and values take registers for what they become."""
    large = dim > 128
    if dtype == torch.float32:
        default = AttentionTile(rows=64, decode_rows=64, keys=32, warps=8, decode_warps=8, stages=1)
    elif chip() in _MMA_SYNC:
        default = AttentionTile(
            rows=32 if large and group <= 32 else 64,
            decode_rows=16 if group <= 16 else 64,
            keys=32,
            warps=8,
            decode_warps=4,
            stages=2,
        )
    elif chip() == "sm_90":
        default = AttentionTile(
            rows=64,
            decode_rows=64,
            keys=32 if large or int8 else 64,
            warps=8 if large else 4,
            decode_warps=8 if large else 4,
            stages=2 if large else 3,
        )
    else:
        keys = 16 if large else 64
        default = AttentionTile(
            rows=64,
            decode_rows=64,
            keys=keys,
            warps=8,
            decode_warps=8,
            stages=3 if int8 else 2,  # two make ptxas spill a few bytes
        )
    key = f"{dtype}/{group}/{dim}{'/int8' if int8 else ''}".removeprefix("torch.")
    return tuned("paged_attention", key, default)
