"""CausalLM: what the rest of a shard knows of a model.

A model is built from a LoadContext, reads its slices there, and computes. It does not sample, does
not know requests, and does not allocate the KV cache.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from headgate.shard.attention_metadata import AttentionMetadata
from headgate.shard.layers.embedding import VocabHead
from headgate.shard.load_context import LoadContext

if TYPE_CHECKING:
    from headgate.shard.kv_cache import KVCache


class CausalLM(ABC):
    """One rank's part of a decoder-only language model. Subclasses set `head`."""

    head: VocabHead

    def __init__(self, context: LoadContext) -> None:
        self.config = context.config
        self.num_layers = context.config.num_layers
        self.num_local_heads = len(context.heads)
        self.num_local_kv_heads = len(context.kv_heads)
        self.head_dim = context.config.head_dim
        self.max_positions = context.max_positions  # positions must be below it
        self.device = context.weights.device
        self.dtype = context.weights.compute_dtype  # of the activations
        self.weight_bytes = 0  # memory that this rank's weights take; known once loaded
        self.heartbeat: Callable[[], None] = _no_heartbeat  # called once per layer

    @abstractmethod
    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_cache: KVCache,
        attention: AttentionMetadata,
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """input_ids, positions int64[T] to normed hidden states [W, hidden_size]; stores their KV.

        `wanted`, int64[W], says of which tokens, in this order; without it of all. A prompt's other
        tokens have no use for what the last layer does after its attention.

        Every rank must call it with the same arguments but for the cache. Raises PeerLost, and
        ValueError for sequences longer than `max_positions`.
        """

    def check_lengths(self, attention: AttentionMetadata) -> None:
        """For `forward` to call first: kernels don't check positions against the tables' length."""
        if attention.max_context_len > self.max_positions:
            raise ValueError(
                f"a sequence of {attention.max_context_len} tokens, where the model was loaded "
                f"for {self.max_positions}"
            )

    def logits(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """hidden[R, hidden_size] to float32[R, vocab_size] on rank 0, None elsewhere.

        Every rank must call it. Raises PeerLost.
        """
        return self.head(hidden)


def _no_heartbeat() -> None:
    pass
