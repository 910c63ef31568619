"""The reference operations against their formulas, written out for one element at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch

from headgate.kernels import ops, reference
from headgate.kernels.int8_cache import Int8Cache
from headgate.shard.attention_metadata import AttentionMetadata

BLOCK = 4


pytestmark = pytest.mark.usefixtures("reference_kernels")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------ attention


def plain_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int, cap: float
) -> torch.Tensor:
    """The last len(q) positions of one row, token by token and head by head, in float64."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    shared = q.shape[1] // k.shape[1]
    for token in range(len(q)):
        position = len(k) - len(q) + token
        first = max(0, position - window + 1) if window else 0
        for head in range(q.shape[1]):
            keys = k[first : position + 1, head // shared].double()
            scores = keys @ q[token, head].double() * scale
            if cap:
                scores = cap * torch.tanh(scores / cap)
            weights = scores.softmax(0)
            out[token, head] = weights @ v[first : position + 1, head // shared].double()
    return out


@dataclass(frozen=True)
class Step:
    caches: tuple[torch.Tensor, torch.Tensor]
    attention: AttentionMetadata
    counts: list[int]  # tokens of each row


def paged(
    rows: list[tuple[int, int]], heads: int, kv_heads: int, dim: int
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor], Step]:
    """Rows of (query length, context length) over scattered blocks; NaN wherever no row has KV."""
    widest = max(-(-context // BLOCK) for _, context in rows)
    num_blocks = len(rows) * widest + 2
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(3))
    tables = order[: len(rows) * widest].view(len(rows), widest).to(torch.int32)
    caches = [torch.full((num_blocks, BLOCK, kv_heads, dim), math.nan) for _ in range(2)]
    keys = [random(context, kv_heads, dim, seed=row) for row, (_, context) in enumerate(rows)]
    values = [random(context, kv_heads, dim, seed=90 + r) for r, (_, context) in enumerate(rows)]
    slots = []
    for row, (count, context) in enumerate(rows):
        positions = torch.arange(context)
        place = tables[row, positions // BLOCK].long() * BLOCK + positions % BLOCK
        ops.write_kv(keys[row], values[row], caches[0], caches[1], place)
        slots.append(place[context - count :])
        tables[row, -(-context // BLOCK) :] = 2**30  # padding that must not be read
    counts = [count for count, _ in rows]
    attention = AttentionMetadata(
        cu_query_lens=torch.tensor([0, *counts]).cumsum(0).to(torch.int32),
        context_lens=torch.tensor([context for _, context in rows], dtype=torch.int32),
        block_tables=tables,
        slot_mapping=torch.cat(slots),
        max_query_len=max(counts),
        max_context_len=max(context for _, context in rows),
    )
    q = random(sum(counts), heads, dim, seed=50)
    return q, keys, values, Step((caches[0], caches[1]), attention, counts)


ROWS = [(1, 9), (5, 5), (1, 1), (3, 17), (1, 200), (1, 210), (7, 12)]


@pytest.mark.parametrize(("window", "cap"), [(0, 0.0), (6, 0.0), (1, 0.0), (0, 3.0), (6, 3.0)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 3), (4, 1), (3, 3)])
def test_paged_attention(heads: int, kv_heads: int, window: int, cap: float) -> None:
    q, keys, values, step = paged(ROWS, heads, kv_heads, 8)
    out = ops.paged_attention(q, *step.caches, step.attention, 0.3, window, cap)
    for row, part in enumerate(out.split(step.counts)):
        query = q.split(step.counts)[row]
        expected = plain_attention(query, keys[row], values[row], 0.3, window, cap)
        torch.testing.assert_close(part.double(), expected, atol=1e-5, rtol=0)


def test_a_row_does_not_depend_on_the_others() -> None:
    q, _, _, step = paged(ROWS, 6, 3, 8)
    together = ops.paged_attention(q, *step.caches, step.attention, 0.3)
    for row, part in enumerate(together.split(step.counts)):
        attention = step.attention
        alone = AttentionMetadata(
            cu_query_lens=torch.tensor([0, step.counts[row]], dtype=torch.int32),
            context_lens=attention.context_lens[row : row + 1],
            block_tables=attention.block_tables[row : row + 1],
            slot_mapping=attention.slot_mapping[:0],
            max_query_len=step.counts[row],
            max_context_len=int(attention.context_lens[row]),
        )
        query = q.split(step.counts)[row]
        single = ops.paged_attention(query, *step.caches, alone, 0.3)
        torch.testing.assert_close(single, part, atol=1e-6, rtol=0)


def test_attention_over_a_narrower_cache() -> None:
    q, keys, values, step = paged([(2, 6), (1, 8)], 4, 2, 8)
    narrow = [cache.to(torch.bfloat16) for cache in step.caches]
    out = ops.paged_attention(q, narrow[0], narrow[1], step.attention, 0.3)
    assert out.dtype == q.dtype
    rounded = [[x.bfloat16().float() for x in part] for part in (keys, values)]
    expected = plain_attention(q[:2], rounded[0][0], rounded[1][0], 0.3, 0, 0.0)
    torch.testing.assert_close(out[:2].double(), expected, atol=1e-5, rtol=0)


def test_rounded_attention_over_a_bfloat16_cache() -> None:
    """Queries and weights are bfloat16 numbers; with other caches or odd dims nothing is."""
    q, keys, values, step = paged([(2, 6), (1, 8)], 4, 2, 16)
    narrow = [cache.to(torch.bfloat16) for cache in step.caches]
    out = ops.paged_attention(q, narrow[0], narrow[1], step.attention, 0.3, rounded=True)
    k, v = (x[1].bfloat16().float().repeat_interleave(2, 1) for x in (keys, values))
    scores = torch.einsum("hd,khd->hk", (q[2] * 0.3).bfloat16().float(), k)
    weights = (scores - scores.amax(1, keepdim=True)).exp().bfloat16().float()
    expected = torch.einsum("hk,khd->hd", weights / weights.sum(1, keepdim=True), v)
    torch.testing.assert_close(out[2], expected, atol=1e-6, rtol=0)
    for caches, dim in ((step.caches, 16), (narrow, 8)):
        k_cache, v_cache = (cache[..., :dim] for cache in caches)
        call = (q[..., :dim].contiguous(), k_cache, v_cache, step.attention, 0.3)
        plain = ops.paged_attention(*call)
        assert torch.equal(ops.paged_attention(*call, rounded=True), plain)


def test_attention_in_bytes_over_an_int8_cache() -> None:
    """Queries are bytes with a scale, weights 255ths of the largest; with odd dims nothing is."""
    q, keys, values, step = paged([(2, 6), (1, 70)], 4, 2, 32)
    caches = [int8_cache(cache) for cache in step.caches]
    call = (q, *caches, step.attention, 0.3)
    out = ops.paged_attention(*call, rounded=True)
    query = q[2] * 0.3
    unit = query.abs().amax(1, keepdim=True) / 127
    rounded = (query / unit).round() * unit
    k, v = (bytes_of(x[1]).repeat_interleave(2, 1) for x in (keys, values))
    scores = torch.einsum("hd,khd->hk", rounded, k)
    weights = (scores - scores.amax(1, keepdim=True)).exp()
    unit = v.abs().amax(2).T / 127  # of each value
    parts = []
    for part in (slice(0, 64), slice(64, 70)):
        scaled = weights[:, part] * unit[:, part]
        step_size = scaled.amax(1, keepdim=True) / 255
        parts.append((scaled / step_size).round() * step_size / unit[:, part])
    expected = torch.einsum("hk,khd->hd", torch.cat(parts, 1), v) / weights.sum(1, keepdim=True)
    torch.testing.assert_close(out[2], expected, atol=1e-5, rtol=0)
    assert not torch.allclose(out, ops.paged_attention(*call), atol=1e-5)
    odd = [int8_cache(cache[..., :24]) for cache in step.caches]
    call = (q[..., :24].contiguous(), *odd, step.attention, 0.3)
    assert torch.equal(ops.paged_attention(*call, rounded=True), ops.paged_attention(*call))


def int8_cache(cache: torch.Tensor) -> Int8Cache:
    blocks, block_size, heads, _ = cache.shape
    scales = torch.zeros(blocks, heads, block_size)
    stored = Int8Cache(torch.zeros(cache.shape, dtype=torch.int8), scales)
    stored.store(cache.flatten(0, 1), torch.arange(blocks * block_size))
    return stored


def bytes_of(x: torch.Tensor) -> torch.Tensor:
    """As it is read from an Int8Cache."""
    unit = x.abs().amax(-1, keepdim=True) / 127
    return (x / unit).round() * unit


# ------------------------------------------------------------------ the rest


def test_rms_norm() -> None:
    x, weight = random(3, 8), random(8, seed=1)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    torch.testing.assert_close(ops.rms_norm(x.clone(), weight, 1e-5), expected)
    residual = random(3, 8, seed=2)
    normed, total = ops.rms_norm_residual(x.clone(), residual.clone(), weight, 1e-5)
    torch.testing.assert_close(total, x + residual)
    torch.testing.assert_close(normed, ops.rms_norm(x + residual, weight, 1e-5))


def test_rms_norm_over_heads() -> None:
    x, weight = random(3, 4, 8), random(8, seed=1)
    expected = torch.stack([ops.rms_norm(x[:, head], weight, 1e-6) for head in range(4)], dim=1)
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-6), expected)


def test_layer_norm() -> None:
    x, weight, bias = random(3, 8), random(8, seed=1), random(8, seed=2)
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias
    torch.testing.assert_close(ops.layer_norm(x, weight, bias, 1e-5), expected)


def test_activations() -> None:
    x = random(3, 8)
    gate, up = x[:, :4], x[:, 4:]
    torch.testing.assert_close(ops.silu_and_mul(x), gate / (1 + (-gate).exp()) * up)
    normal = 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
    torch.testing.assert_close(ops.gelu_and_mul(x), gate * normal * up)
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    torch.testing.assert_close(ops.gelu_and_mul(x, tanh=True), 0.5 * gate * (1 + inner.tanh()) * up)


def test_embedding_of_part_of_the_vocabulary() -> None:
    weight = random(4, 3)
    ids = torch.tensor([9, 10, 13, 14, 0])
    got = ops.embedding(ids, weight, 10, torch.float32)
    zeros = torch.zeros(3)
    expected = torch.stack([zeros, weight[0], weight[3], zeros, zeros])
    assert torch.equal(got, expected)


@pytest.mark.parametrize("rotated", [8, 4])
def test_rotary_embedding(rotated: int) -> None:
    """Pairs (i, i + rotated/2) are complex numbers turned by an angle; the rest stays."""
    angles = random(20, rotated // 2)
    table = torch.cat((angles.cos(), angles.sin()), dim=1)
    q, k, positions = random(5, 3, 8), random(5, 2, 8, seed=1), torch.tensor([0, 7, 3, 19, 7])
    turned = ops.rotary_embedding(q.clone(), k.clone(), positions, table)
    for before, after in zip((q, k), turned, strict=True):
        half = rotated // 2
        numbers = torch.complex(before[..., :half], before[..., half:rotated])
        numbers = numbers * torch.polar(torch.ones(5, half), angles[positions]).unsqueeze(1)
        expected = torch.cat((numbers.real, numbers.imag, before[..., rotated:]), dim=-1)
        torch.testing.assert_close(after, expected)


def test_rotary_embedding_of_views() -> None:
    """Queries and keys are views into one matrix product's result."""
    joined = random(5, 40)
    q, k = joined[:, :24].view(5, 3, 8), joined[:, 24:].view(5, 2, 8)
    table, positions = random(9, 8, seed=4), torch.arange(5)
    expected = ops.rotary_embedding(q.clone(), k.clone(), positions, table)
    for got, want in zip(ops.rotary_embedding(q, k, positions, table), expected, strict=True):
        assert torch.equal(got, want)


# ------------------------------------------------------------------ the table


def fake_backend(monkeypatch: pytest.MonkeyPatch, **offered: object) -> None:
    module = ModuleType("headgate.kernels.cpu")
    module.OPS = offered  # type: ignore[attr-defined]
    module.available = lambda: True  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "headgate.kernels.cpu", module)


def test_a_backend_replaces_what_it_offers(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_backend(monkeypatch, silu_and_mul=lambda x: "fast")
    assert ops.use("", "cpu") == "cpu"
    assert ops.silu_and_mul(torch.ones(1, 2)) == "fast"
    assert torch.equal(ops.linear(torch.ones(1, 2), torch.ones(1, 2)), torch.tensor([[2.0]]))
    assert ops.use("reference") == "reference"
    assert isinstance(ops.silu_and_mul(torch.ones(1, 2)), torch.Tensor)


def test_a_backend_that_is_not_there() -> None:
    with pytest.raises(ops.BackendUnavailable, match="unknown kernels 'tpu'"):
        ops.use("tpu")


def test_a_backend_with_an_unknown_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_backend(monkeypatch, frobnicate=print)
    with pytest.raises(ops.BackendUnavailable, match="frobnicate"):
        ops.use("cpu")


def test_every_operation_has_a_reference() -> None:
    named = {name for name in reference.OPS if callable(getattr(ops, name, None))}
    assert named == set(reference.OPS)
