"""Every operation in plain torch: the oracle of the other back ends' tests, and the fallback.

Clear first; only attention is arranged with speed in mind, because this file also serves where no
faster back end is built. It knows tensors only: no models, no ranks, no hardware.

Shapes: T tokens of a step, R rows, H query heads, K key/value heads (H is a multiple of K), D head
dim. Results have the dtype of their input; sums inside a norm and a softmax are float32.
Numbers of one row may differ in the last bits with the number of rows computed beside it, since
torch's matrix products choose their order of summation by shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from headgate.kernels import quantised, reference_products
from headgate.kernels.int8_cache import Int8Cache, PagedCache
from headgate.kernels.philox import NOISE_MAX, NOISE_MIN, Draw, gumbel_noise_at
from headgate.kernels.quantised import QuantisedTensor, quantise_inputs
from headgate.quant_kinds import BYTE_DIMS, KINDS

if TYPE_CHECKING:  # kernels import nothing of shard; the step's metadata is read by its fields only
    from headgate.shard.attention_metadata import AttentionMetadata

# Decode rows computed together: the longest may exceed the shortest by this factor and constant.
_BUCKET_GROWTH = 1.25
_BUCKET_SLACK = 64

# Attention rounds to bfloat16 where this divides the head dim; as kPairedDims of cpu/kernels.h,
# where BYTE_DIMS is kByteDims.
PAIRED_DIMS = 16
# Keys whose weights, as bytes, have one scale: those from a multiple of it on.
_KEY_BLOCK = 64
_LEAST_WEIGHT = 1e-30  # where the largest is below, all are zeros


def embedding(
    ids: torch.Tensor, weight: torch.Tensor, first_id: int, dtype: torch.dtype
) -> torch.Tensor:
    """Rows of `weight`[V, N], whose first is for `first_id`; zeros for ids outside. [T, N]."""
    local = ids - first_id
    inside = (local >= 0) & (local < weight.shape[0])
    rows = F.embedding(local.clamp(0, max(weight.shape[0] - 1, 0)), weight).to(dtype)
    return rows.masked_fill_(~inside.unsqueeze(-1), 0)


def take_rows(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Rows `indices`[S] of x[T, N]: [S, N]."""
    return x[indices]


@dataclass(frozen=True, slots=True, eq=False)
class RoundedTensor:
    """A matrix float32[N, K] of bfloat16 values whose inputs are rounded to bfloat16 too."""

    weight: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes


def pack_linear(
    weight: torch.Tensor, dtype: torch.dtype, quantize: str = "", precision: str = "highest"
) -> torch.Tensor | QuantisedTensor | RoundedTensor:
    """weight[O, I] in the form that `linear` likes best: quantised, where `quantize` names a kind.

    Otherwise `dtype` can hold its values, which are kept: as float32 on a CPU, where products are.
    `precision`: "medium" is for bfloat16 on a CPU, and rounds inputs to bfloat16 as well.
    """
    if quantize:
        return quantised.quantise(weight, KINDS[quantize])
    if precision == "medium":
        return RoundedTensor(weight.to(dtype).float())
    return weight.float() if weight.device.type == "cpu" else weight


def linear(
    x: torch.Tensor,
    weight: torch.Tensor | QuantisedTensor | RoundedTensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """x[T, I] times the transpose of weight[O, I], plus bias[O]: [T, O].

    What a product with a quantised weight is, is said in headgate.kernels.quantised.
    """
    if isinstance(weight, RoundedTensor):
        return F.linear(x.bfloat16().float(), weight.weight, bias)
    if not isinstance(weight, QuantisedTensor):
        return F.linear(x, weight, bias)
    out = quantised.linear(x, weight)
    return out if bias is None else out + bias


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return wide.to(x.dtype) * weight


def rms_norm_residual(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x + residual), x + residual). May overwrite both inputs.

    x may have a dimension more, [W, ..]: parts of a sum, which are added in order first.
    """
    if x.dim() > residual.dim():
        first, *others = x
        x = first.clone()
        for part in others:
            x += part
    total = x + residual
    return rms_norm(total, weight, eps), total


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of x[T, 2I] = [gate, up]: [T, I]."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def gelu_and_mul(x: torch.Tensor, tanh: bool) -> torch.Tensor:
    """gelu(gate) * up of x[T, 2I] = [gate, up]: [T, I]. `tanh`: the tanh approximation."""
    gate, up = x.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh" if tanh else "none") * up


def rotary_embedding(
    q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates the first dimensions of every head of q[T, H, D] and k[T, K, D] by their position.

    `cos_sin`[P, r]: for each position r/2 cosines, then r/2 sines; r <= D dimensions are rotated,
    dimension i together with i + r/2. q and k may be views with strides. May work in place.
    """
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat([part.to(x.dtype) for part in turned] + [rest], dim=-1)


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
    """`rotary_embedding`, then `write_kv` of the rotated k and of v; returns the rotated q.

    `norms`: weights[D] of an `rms_norm` of every head of q and of k before that, and its eps.
    """
    if norms is not None:
        q, k = rms_norm(q, norms[0], norms[2]), rms_norm(k, norms[1], norms[2])
    q, k = rotary_embedding(q, k, positions, cos_sin)
    write_kv(k, v, k_cache, v_cache, slot_mapping)
    return q


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: PagedCache,
    v_cache: PagedCache,
    slot_mapping: torch.Tensor,
) -> None:
    """Stores k, v[T, K, D] at slots `slot_mapping`[T] of the caches [blocks, block_size, K, D].

    What float16 and float8 caches cannot hold, infinity too, is cut to their range; NaN stays NaN.
    What an Int8Cache makes of them is said there.
    """
    for x, cache in ((k, k_cache), (v, v_cache)):
        if isinstance(cache, Int8Cache):
            cache.store(x, slot_mapping)
            continue
        if cache.dtype not in (torch.float32, torch.bfloat16):
            limit = torch.finfo(cache.dtype).max
            x = x.float().clamp(-limit, limit)
        cache.flatten(0, 1)[slot_mapping] = x.to(cache.dtype)


@dataclass(frozen=True, slots=True)
class _Kind:
    """What `paged_attention` was asked for besides tensors of the step."""

    scale: float
    window: int
    soft_cap: float
    alibi_slopes: torch.Tensor | None
    rounded: bool  # to bfloat16
    in_bytes: bool

    def bias(self, distance: torch.Tensor, *shape: int) -> torch.Tensor | None:
        """ALiBi's bias: the slopes in `shape` times `distance`, key - query, zero or less."""
        return None if self.alibi_slopes is None else self.alibi_slopes.view(shape) * distance


def argmax(scores: torch.Tensor) -> npt.NDArray[np.int64]:
    """Of each row of [R, N], the first of the largest; on the host."""
    if scores.device.type == "cpu":
        return scores.numpy().argmax(axis=1)  # ten times as fast as torch's
    return scores.argmax(dim=1).cpu().numpy()


def gumbel_argmax(
    scores: npt.NDArray[np.float32], best: float, temperature: float, draw: Draw
) -> int:
    """The id with the largest (score - best) / temperature + Gumbel noise, the first of equals.

    scores: float32[vocab] on the host, all below infinity; `best`, the largest, is finite.
    """
    temperature, largest = np.float32(temperature), np.float32(best)
    # A score this far below the best cannot win: the noise spans no more.
    floor = largest - np.float32(NOISE_MAX - NOISE_MIN) * temperature
    ids = np.flatnonzero(scores >= floor)
    return int(ids[((scores[ids] - largest) / temperature + gumbel_noise_at(draw, ids)).argmax()])


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
    """Causal attention of q[T, H, D] over the paged KV of each token's own row: [T, H, D].

    Rows that compute one token (decode) and rows that compute many (chunks of a prompt) may be
    mixed. The step's own keys and values must be in the cache already. `window` > 0: a token sees
    only itself and the `window` - 1 tokens before it. `soft_cap` > 0: scores become
    cap * tanh(score / cap). `alibi_slopes` float32[H]: scores fall by the slope for each position
    between query and key. Query heads h * H/K ... (h + 1) * H/K - 1 share key/value head h.
    `rounded`: where the caches are bfloat16 and D is a multiple of 16, scaled queries and weights
    are rounded to bfloat16 too, and sums are float32: products of pairs of such numbers are one
    instruction on some CPUs. A weight is rounded as e^(score - largest), of the scores so far where
    keys are taken in turn; it is divided by the sum of the rounded ones afterwards. Where the
    caches are Int8Caches and D is a multiple of 32, scaled queries become bytes as keys are, and
    weights times their values' scales whole 255ths of the largest of each 64 positions from a
    multiple of 64 on: products of four bytes are one instruction on some CPUs.
    """
    narrow = isinstance(k_cache, torch.Tensor) and k_cache.dtype == torch.bfloat16
    in_pairs = rounded and narrow and q.shape[2] % PAIRED_DIMS == 0
    in_bytes = rounded and isinstance(k_cache, Int8Cache) and q.shape[2] % BYTE_DIMS == 0
    kind = _Kind(scale, window, soft_cap, alibi_slopes, in_pairs, in_bytes)
    out = q.new_empty(q.shape)
    starts = attention.cu_query_lens.tolist()
    contexts = attention.context_lens.tolist()
    decode_rows: list[int] = []
    for row, context in enumerate(contexts):
        first, last = starts[row], starts[row + 1]
        if last - first == 1:
            decode_rows.append(row)
        elif last > first:
            table = attention.block_tables[row]
            out[first:last] = _attend_chunk(q[first:last], k_cache, v_cache, table, context, kind)
    for rows in _buckets(decode_rows, contexts):
        tokens = [starts[row] for row in rows]
        tables = attention.block_tables[rows]
        lengths = attention.context_lens[rows]
        longest = max(contexts[row] for row in rows)
        out[tokens] = _attend_decode(q[tokens], k_cache, v_cache, tables, lengths, longest, kind)
    return out


def _buckets(rows: list[int], contexts: list[int]) -> Iterator[list[int]]:
    """Rows of similar context length, so that padding them to the longest wastes little."""
    bucket: list[int] = []
    for row in sorted(rows, key=lambda row: contexts[row]):
        if bucket and contexts[row] > contexts[bucket[0]] * _BUCKET_GROWTH + _BUCKET_SLACK:
            yield bucket
            bucket = []
        bucket.append(row)
    if bucket:
        yield bucket


def _attend_chunk(
    q: torch.Tensor,
    k_cache: PagedCache,
    v_cache: PagedCache,
    table: torch.Tensor,
    context: int,
    kind: _Kind,
) -> torch.Tensor:
    """One row's chunk: q[C, H, D] are its last C positions. [C, H, D]."""
    size, heads, dim = q.shape
    block_size, kv_heads = k_cache.shape[1:3]
    first_query = context - size
    # Blocks that no query of this chunk can see need not be read.
    window = kind.window
    first_block = max(first_query - window + 1, 0) // block_size if window else 0
    blocks = table[first_block : -(-context // block_size)].long()
    offset = first_block * block_size
    length = context - offset
    keys, values = (
        cache[blocks].to(q.dtype).flatten(0, 1)[:length].transpose(0, 1).unsqueeze(1)
        for cache in (k_cache, v_cache)
    )  # [K, 1, length, D]
    queries = q.view(size, kv_heads, heads // kv_heads, dim).permute(1, 2, 0, 3)
    query_at = torch.arange(first_query, context, device=q.device).unsqueeze(1)
    key_at = torch.arange(offset, context, device=q.device)
    visible = key_at <= query_at
    if window:
        visible &= key_at > query_at - window
    bias = kind.bias(key_at - query_at, kv_heads, -1, 1, 1)
    if kind.in_bytes:
        scales = _scales(v_cache, blocks).flatten(0, 1)[:length].T[:, None, None]
        out = _attend_in_bytes(queries, keys, values, visible, kind, bias, scales, offset)
    else:
        out = _softmax_attention(queries, keys, values, visible, kind, bias)
    return out.permute(2, 0, 1, 3).reshape(size, heads, dim)


def _attend_decode(
    q: torch.Tensor,
    k_cache: PagedCache,
    v_cache: PagedCache,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    longest: int,
    kind: _Kind,
) -> torch.Tensor:
    """One token each of several rows: q[N, H, D], tables[N, blocks], lengths[N]. [N, H, D]."""
    rows, heads, dim = q.shape
    block_size, kv_heads = k_cache.shape[1:3]
    blocks = tables[:, : -(-longest // block_size)].long()
    # A short row's table may be padded with anything past its end; block 0 is as good to read.
    ends = (lengths.unsqueeze(1) + block_size - 1) // block_size
    unused = torch.arange(blocks.shape[1], device=q.device) >= ends
    blocks = blocks.masked_fill(unused, 0)
    key_at = torch.arange(blocks.shape[1] * block_size, device=q.device)
    visible = key_at < lengths.unsqueeze(1)
    if kind.window:
        visible &= key_at >= lengths.unsqueeze(1) - kind.window
    # Slots that are not the row's may hold NaN, which neither a mask nor a weight of zero stops.
    keys, values = (
        cache[blocks]
        .to(q.dtype)
        .flatten(1, 2)
        .masked_fill_(~visible[:, :, None, None], 0)
        .transpose(1, 2)
        for cache in (k_cache, v_cache)
    )  # [N, K, L, D]
    visible = visible[:, None, None, :]
    # The heads of a group take the place of query positions: one matrix product for all of them.
    queries = q.view(rows, kv_heads, heads // kv_heads, dim)
    bias = kind.bias((key_at - lengths.unsqueeze(1) + 1)[:, None, None], kv_heads, -1, 1)
    if kind.in_bytes:
        scales = _scales(v_cache, blocks).flatten(1, 2).transpose(1, 2).unsqueeze(2)
        scales = scales.masked_fill(~visible, 0)
        out = _attend_in_bytes(queries, keys, values, visible, kind, bias, scales, 0)
    else:
        out = _softmax_attention(queries, keys, values, visible, kind, bias)
    return out.reshape(rows, heads, dim)


def _softmax_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor,
    kind: _Kind,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of q[A, B, C, D] over k, v[A, B or 1, L, D] where `visible`[..., C or 1, L].

    `bias`[A or nothing, B, C, L] is added to the scores.
    """
    if not (kind.soft_cap or kind.rounded) and bias is None:
        k, v = (x.expand(*q.shape[:2], *x.shape[2:]) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=kind.scale)
    if kind.rounded:
        scores = (q * kind.scale).bfloat16().float() @ k.float().transpose(-1, -2)
    else:
        scores = (q @ k.transpose(-1, -2)).float() * kind.scale
    scores = _seen(scores, visible, kind, bias)
    if not kind.rounded:
        return scores.softmax(-1).to(v.dtype) @ v
    weights = (scores - scores.amax(-1, keepdim=True)).exp().bfloat16().float()
    return (weights @ v.float() / weights.sum(-1, keepdim=True)).to(v.dtype)


def _seen(
    scores: torch.Tensor, visible: torch.Tensor, kind: _Kind, bias: torch.Tensor | None
) -> torch.Tensor:
    """Scores before the softmax."""
    if kind.soft_cap:
        scores = kind.soft_cap * torch.tanh(scores / kind.soft_cap)
    if bias is not None:
        scores = scores + bias
    return scores.masked_fill(~visible, float("-inf"))


def _attend_in_bytes(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor,
    kind: _Kind,
    bias: torch.Tensor | None,
    scales: torch.Tensor,
    first: int,
) -> torch.Tensor:
    """As `_softmax_attention`, of bytes; `scales`[A, B or 1, 1, L] of the values, `first`: the
    first key's position."""
    values, query_scales = quantise_inputs(q.float() * kind.scale, q.shape[-1])  # one group
    scores = values.squeeze(-2) * query_scales @ k.float().transpose(-1, -2)
    scores = _seen(scores, visible, kind, bias)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    whole = torch.where(scales == 0, 0.0, v.float().transpose(-1, -2) / scales)
    rounded = _weights_in_bytes(weights * scales, first) @ whole.transpose(-1, -2)
    return (rounded / weights.sum(-1, keepdim=True)).to(v.dtype)


def _weights_in_bytes(weights: torch.Tensor, first: int) -> torch.Tensor:
    """weights[.., L] of positions from `first` on, as they are read from bytes."""
    before, size = first % _KEY_BLOCK, weights.shape[-1]
    padded = F.pad(weights, (before, -(before + size) % _KEY_BLOCK)).unflatten(-1, (-1, _KEY_BLOCK))
    largest = padded.amax(-1, keepdim=True)
    inverse = torch.where(largest < _LEAST_WEIGHT, 0.0, 255.0 / largest)
    whole = (padded * inverse).round() * (largest / 255.0)
    return whole.flatten(-2)[..., before : before + size]


def _scales(cache: PagedCache, blocks: torch.Tensor) -> torch.Tensor:
    """[.., block_size, K]"""
    assert isinstance(cache, Int8Cache)
    return cache.scales[blocks].transpose(-1, -2)


OPS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        embedding,
        take_rows,
        pack_linear,
        linear,
        rms_norm,
        rms_norm_residual,
        layer_norm,
        silu_and_mul,
        gelu_and_mul,
        rotary_embedding,
        rotary_and_write_kv,
        write_kv,
        argmax,
        gumbel_argmax,
        paged_attention,
    )
} | reference_products.OPS
