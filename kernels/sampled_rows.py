"""What an operation that samples on the device is told of its rows, as columns of tensors.

R rows get a token; P of them have penalties, M of them a mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, eq=False)
class BiasedTokens:
    """N numbers to add to logits, one per row and token at most."""

    rows: torch.Tensor  # int64[N]
    token_ids: torch.Tensor  # int64[N]
    values: torch.Tensor  # float32[N]


@dataclass(frozen=True, slots=True, eq=False)
class PenalisedRows:
    """Rows with a repetition, frequency or presence penalty, and their tokens one after another."""

    rows: torch.Tensor  # int32[P]: which rows of the logits
    repetition: torch.Tensor  # float32[P]
    frequency: torch.Tensor  # float32[P]
    presence: torch.Tensor  # float32[P]
    token_ids: torch.Tensor  # int32[N]
    starts: torch.Tensor  # int32[P + 1]: where each row's tokens start; the last is N
    num_prompt: torch.Tensor  # int32[P]: how many of them are the prompt
    longest: int  # most tokens of any row


@dataclass(frozen=True, slots=True, eq=False)
class MaskedRows:
    """Rows that may take only some tokens."""

    rows: torch.Tensor  # int32[M]
    bits: torch.Tensor  # int32[M, ceil(vocab / 32)]: token t may be taken if bit t % 32 is set


@dataclass(frozen=True, slots=True, eq=False)
class RowsToSample:
    """Parameters of each row. Neutral: 0 for temperature (greedy), top_k and min_p, else 1."""

    temperature: torch.Tensor  # float32[R]
    top_k: torch.Tensor  # int32[R]
    top_p: torch.Tensor  # float32[R]
    typical_p: torch.Tensor  # float32[R]
    min_p: torch.Tensor  # float32[R]
    seed: torch.Tensor  # int64[R]: the bits of 64 without sign
    position: torch.Tensor  # int32[R]: of the token in the row's output
    sample_index: torch.Tensor  # int32[R]
    biased: BiasedTokens | None = None
    penalised: PenalisedRows | None = None
    masked: MaskedRows | None = None
