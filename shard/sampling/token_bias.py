"""What a request says about tokens: a bias of their logits, which may come, and which may not."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from headgate.proto.messages import RowSampling
from headgate.shard.sampling.bad_words import BadWords


@dataclass(frozen=True, slots=True, eq=False)
class TokenBias:
    """One row's, ready to be applied."""

    ids: npt.NDArray[np.int64]
    values: npt.NDArray[np.float32]  # of `ids`, added to their logits
    allowed: npt.NDArray[np.bool_] | None  # [vocab]; None: all tokens
    bad_words: BadWords | None = None

    @classmethod
    def of(cls, sampling: RowSampling, vocab_size: int) -> TokenBias | None:
        """None where the row says nothing."""
        if not (sampling.logit_bias or sampling.allowed_token_ids or sampling.bad_words):
            return None
        allowed = None
        if sampling.allowed_token_ids:
            allowed = np.zeros(vocab_size, np.bool_)
            allowed[list(sampling.allowed_token_ids)] = True
        ids = np.array([id_ for id_, _ in sampling.logit_bias], np.int64)
        values = np.array([value for _, value in sampling.logit_bias], np.float32)
        bad_words = BadWords(sampling.bad_words) if sampling.bad_words else None
        return cls(ids, values, allowed, bad_words)

    def apply(self, scores: npt.NDArray[np.float32]) -> None:
        """Adds the bias in place. scores: float32[vocab]."""
        scores[self.ids] += self.values
