"""Rows of random keys and values laid out in paged caches, NaN wherever no row has any."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from headgate.kernels.int8_cache import Int8Cache, PagedCache
from headgate.shard.attention_metadata import AttentionMetadata


@dataclass(frozen=True)
class Row:
    """One sequence: q[L, H, D], k and v[L, K, D] of all its positions."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    @classmethod
    def random(cls, length: int, heads: int, kv_heads: int, dim: int, seed: int) -> Row:
        generator = torch.Generator().manual_seed(seed)
        sizes = (heads, kv_heads, kv_heads)
        return cls(*(torch.randn(length, size, dim, generator=generator) for size in sizes))


@dataclass(frozen=True)
class Chunk:
    """What a step computes of a row: its positions [first, last), with all before in the cache."""

    row: Row
    first: int
    last: int


def empty_cache(
    shape: tuple[int, ...], dtype: torch.dtype, device: str | torch.device = "cpu"
) -> PagedCache:
    """Keys or values [blocks, block_size, K, D] that read as NaN. int8 means an Int8Cache."""
    if dtype != torch.int8:
        return torch.full(shape, torch.nan, device=device).to(dtype)
    blocks, block_size, kv_heads, _ = shape
    return Int8Cache(
        torch.full(shape, 77, dtype=torch.int8, device=device),
        torch.full((blocks, kv_heads, block_size), torch.nan, device=device),
    )


def widened(cache: PagedCache) -> torch.Tensor:
    """All of it in float32, as it is read."""
    return cache[:] if isinstance(cache, Int8Cache) else cache.float()


def make_step(
    chunks: list[Chunk], block_size: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[torch.Tensor, PagedCache, PagedCache, AttentionMetadata]:
    """Queries, caches and metadata of a step over scattered blocks. int8 means Int8Caches."""
    generator = torch.Generator().manual_seed(seed)
    widest = max(-(-chunk.last // block_size) for chunk in chunks)
    num_blocks = len(chunks) * widest + 2
    order = torch.randperm(num_blocks, generator=generator)[: len(chunks) * widest]
    tables = order.view(len(chunks), widest).int()
    shape = (num_blocks, block_size, *chunks[0].row.k.shape[1:])
    caches = empty_cache(shape, dtype), empty_cache(shape, dtype)
    for table, chunk in zip(tables, chunks, strict=True):
        at = torch.arange(chunk.last)
        slots = table[at // block_size].long() * block_size + at % block_size
        for cache, values in zip(caches, (chunk.row.k, chunk.row.v), strict=True):
            if isinstance(cache, Int8Cache):
                cache.store(values[: chunk.last], slots)
            else:
                cache.flatten(0, 1)[slots] = values[: chunk.last].to(dtype)
        # Entries past a row's end mean nothing, and must not be followed.
        table[-(-chunk.last // block_size) :] = 2**30
    lengths = [chunk.last - chunk.first for chunk in chunks]
    metadata = AttentionMetadata(
        cu_query_lens=torch.tensor([0, *lengths]).cumsum(0).int(),
        context_lens=torch.tensor([chunk.last for chunk in chunks]).int(),
        block_tables=tables,
        slot_mapping=torch.zeros(sum(lengths), dtype=torch.int64),
        max_query_len=max(lengths),
        max_context_len=max(chunk.last for chunk in chunks),
    )
    q = torch.cat([chunk.row.q[chunk.first : chunk.last] for chunk in chunks])
    return q, *caches, metadata
