"""The vocabulary's two layers, split by token id: ids to vectors, vectors to logits."""

from __future__ import annotations

import torch

from headgate.kernels import ops
from headgate.shard.load_context import LoadContext


class VocabEmbedding:
    """Token ids to vectors. A rank gives zeros for ids it does not hold, so the sum is exact."""

    def __init__(self, context: LoadContext, name: str) -> None:
        config = context.config
        shape = (config.vocab_size, config.hidden_size)
        self.table = context.weights.table(name, shape, context.vocabulary)
        self._first_id = context.vocabulary.start
        self._dtype = context.weights.compute_dtype
        self._group = context.group

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """ids[T] to [T, hidden_size]."""
        return self._group.all_reduce(ops.embedding(ids, self.table, self._first_id, self._dtype))


class VocabHead:
    """Vectors to logits, collected on rank 0."""

    def __init__(self, context: LoadContext, name: str, tied: VocabEmbedding | None = None) -> None:
        config, weights = context.config, context.weights
        self.shortlist = None
        if tied is not None:
            weights.ignore(name)
            self._weight = weights.tied(tied.table)
            shortlist = weights.shortlist(tied.table, self._weight)
            # Ranks on different machines need not all have one, and it takes all of them.
            if context.group.min(int(shortlist is not None)):
                self.shortlist = shortlist
        else:
            shape = (config.vocab_size, config.hidden_size)
            self._weight = weights.head(name, shape, context.vocabulary)
        self._first_id = context.vocabulary.start
        self._sizes = [len(ids) for ids in context.partition.vocabulary]
        self._group = context.group

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """hidden[R, hidden_size] to float32[R, vocab_size] on rank 0, None elsewhere."""
        if hidden.shape[0] == 0:
            empty = hidden.new_empty((0, sum(self._sizes)), dtype=torch.float32)
            return empty if self._group.rank == 0 else None
        return self._gathered(ops.linear(hidden, self._weight), 0)

    def choose(
        self, hidden: torch.Tensor, likeliest: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(where `likeliest` is 1, the likeliest tokens, int64[R], on all ranks; where it is 0,
        what calling gives). What is not asked for may be anything. Of the back ends that choose."""
        if self.shortlist is None:
            logits = ops.linear(hidden, self._weight)
        else:
            logits = ops.linear_largest(
                hidden, self._weight, self.shortlist, likeliest, self._group
            )
        tokens = ops.likeliest_tokens(logits, self._first_id, likeliest, self._group)
        return tokens, self._gathered(logits, likeliest)

    def _gathered(self, logits: torch.Tensor, needless: int) -> torch.Tensor | None:
        gathered = self._group.gather_to_rank0(logits, 1, self._sizes, needless)
        return None if gathered is None else gathered.float()
