"""What attention has to know about a step's rows: tensors that are built once per step.

It does not know requests, tokens or sampling.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, eq=False)
class AttentionMetadata:
    """R rows computing T tokens in all, one row after another.

    Every token attends to its own row's KV from position 0 up to itself.
    """

    cu_query_lens: torch.Tensor  # int32[R + 1]: where each row's tokens start; the last is T
    context_lens: torch.Tensor  # int32[R]: the row's KV length after this step
    block_tables: torch.Tensor  # int32[R, max_blocks]: the row's KV blocks, by position
    slot_mapping: torch.Tensor  # int64[T]: block * block_size + offset where each token's KV goes
    max_query_len: int  # most tokens any row computes in this step
    max_context_len: int  # largest of context_lens
