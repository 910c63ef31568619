"""Drives a model over a paged KV cache for tests: rows in chunks, mixed steps, scattered blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from headgate.shard.attention_metadata import AttentionMetadata
from headgate.shard.kv_cache import KVCache, KVCacheLayout
from headgate.shard.models.base import CausalLM

BLOCK_SIZE = 4


class PagedRows:
    """Some rows with `capacity` positions each; `logits` collects what `step` computes for them."""

    def __init__(
        self,
        model: CausalLM,
        num_rows: int,
        capacity: int,
        kv_dtype: torch.dtype = torch.float32,
    ) -> None:
        blocks_per_row = -(-capacity // BLOCK_SIZE)
        num_blocks = num_rows * blocks_per_row + 3
        layout = KVCacheLayout(
            model.num_layers, BLOCK_SIZE, model.num_local_kv_heads, model.head_dim, kv_dtype
        )
        self._model = model
        self._cache = KVCache(layout, num_blocks)
        for tensor in self._cache.tensors:
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))  # what a row may not see must not reach it
        generator = torch.Generator().manual_seed(7)
        order = torch.randperm(num_blocks, generator=generator)
        self._tables = order[: num_rows * blocks_per_row].view(num_rows, -1).to(torch.int32)
        self._lengths = [0] * num_rows
        self._logits: list[list[torch.Tensor]] = [[] for _ in range(num_rows)]

    def logits(self, row: int) -> torch.Tensor:
        """[tokens so far, vocab], on rank 0."""
        return torch.cat(self._logits[row])

    def step(self, tokens: Mapping[int, Sequence[int]]) -> None:
        """Computes the next ids of several rows, {row: ids}."""
        rows, counts = list(tokens), [len(ids) for ids in tokens.values()]
        starts = [self._lengths[row] for row in rows]
        for row, count in zip(rows, counts, strict=True):
            self._lengths[row] += count
        contexts = [self._lengths[row] for row in rows]
        positions = torch.cat(
            [torch.arange(start, end) for start, end in zip(starts, contexts, strict=True)]
        )
        owners = torch.repeat_interleave(torch.tensor(rows), torch.tensor(counts))
        blocks = self._tables[owners, positions // BLOCK_SIZE].long()
        attention = AttentionMetadata(
            cu_query_lens=torch.tensor([0, *counts]).cumsum(0).to(torch.int32),
            context_lens=torch.tensor(contexts, dtype=torch.int32),
            block_tables=self._tables[rows],
            slot_mapping=blocks * BLOCK_SIZE + positions % BLOCK_SIZE,
            max_query_len=max(counts),
            max_context_len=max(contexts),
        )
        ids = torch.tensor([token for row_ids in tokens.values() for token in row_ids])
        hidden = self._model.forward(ids, positions, self._cache, attention)
        logits = self._model.logits(hidden)
        if logits is not None:
            for row, part in zip(rows, logits.split(counts), strict=True):
                self._logits[row].append(part)
