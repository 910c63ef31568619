"""A model for tests of what surrounds models: its next token is a hash of all tokens before it.

The tokens are kept in the paged KV cache and read back through the block tables, so that a wrong
slot, block or length gives wrong tokens. No weights; any number of ranks computes the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch

from headgate.shard.attention_metadata import AttentionMetadata
from headgate.shard.config import ShardConfig
from headgate.shard.distributed import Group, single_group
from headgate.shard.kv_cache import KVCache

VOCAB = 96
EOS = 95
_LOGITS = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(5)) * 2
_LOGITS[:, EOS] -= 100  # no row ends unless a test wants it


class FakeModel:
    """Obeys CausalLM's interface."""

    def __init__(self, group: Group | None = None) -> None:
        self.config = SimpleNamespace(
            vocab_size=VOCAB,
            eos_token_ids=(EOS,),
            model_type="fake",
            max_position_embeddings=4096,
        )
        self.num_layers, self.num_local_heads, self.num_local_kv_heads, self.head_dim = 1, 1, 1, 1
        self.max_positions = 4096
        self.weight_bytes = 0
        self.heartbeat: Callable[[], None] = lambda: None
        self.group = group or single_group()
        self.batches: list[int] = []  # tokens of each forward
        self.largest_logits = 0  # rows

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_cache: KVCache,
        attention: AttentionMetadata,
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self.heartbeat()
        self.batches.append(len(input_ids))
        keys, values = kv_cache.layers[0]
        block_size = keys.shape[1]
        kept = attention.slot_mapping >= 0
        keys.view(-1)[attention.slot_mapping[kept]] = input_ids[kept].to(keys.dtype)
        values.view(-1)[attention.slot_mapping[kept]] = positions[kept].to(values.dtype)
        hidden = []
        for row, length in enumerate(attention.context_lens.tolist()):
            if not kept[len(hidden)]:  # a row that only fills the step up
                hidden += [0] * length
                continue
            blocks = attention.block_tables[row, : -(-length // block_size)].long()
            tokens = keys[blocks].flatten()[:length].long().tolist()
            places = values[blocks].flatten()[:length].long().tolist()
            assert places == list(range(length)), "a position was never computed"
            start, end = attention.cu_query_lens[row : row + 2].tolist()
            for position in range(length - (end - start), length):
                hidden.append(state(tokens[: position + 1]))
        states = torch.tensor(hidden, dtype=torch.float32).unsqueeze(1)
        return states if wanted is None else states[wanted]

    def check_lengths(self, attention: AttentionMetadata) -> None:
        assert attention.max_context_len <= self.max_positions

    def logits(self, hidden: torch.Tensor) -> torch.Tensor | None:
        self.largest_logits = max(self.largest_logits, len(hidden))
        return None if self.group.rank else _LOGITS[hidden[:, 0].long()]


def state(tokens: Sequence[int]) -> int:
    """What the model makes of its context."""
    value = 7
    for token in tokens:
        value = (value * 31 + token + 1) % 8191
    return value % VOCAB


def logits_after(tokens: Sequence[int]) -> torch.Tensor:
    """float32[VOCAB]"""
    return _LOGITS[state(tokens)]


def greedy(prompt: Sequence[int], count: int) -> list[int]:
    """The tokens the model continues `prompt` with."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(logits_after(tokens).argmax()))
    return tokens[len(prompt) :]


def shard_config(**fields: object) -> ShardConfig:
    """A small CPU shard's configuration."""
    defaults = {
        "model_path": "",
        "dtype": "float32",
        "device": "cpu",
        "num_threads": 1,
        "max_batch_prefill_tokens": 64,
        "max_batch_size": 8,
        "max_total_tokens": 128,
        "addresses": ("unix:unused",),
        "block_size": 4,
        "num_blocks": 40,
    }
    return ShardConfig(**{**defaults, **fields})  # type: ignore[arg-type]
