"""What a step tells of the prompt tokens it computes: log-probabilities, pooled states."""

from __future__ import annotations

from collections.abc import Callable

import torch

from headgate.proto.messages import PooledStates, PromptLogprobs, TopTokens
from headgate.shard.sampling.logprobs import token_logprobs
from headgate.shard.step_inputs import PooledChunk, PromptChunk


def prompt_logprobs(
    hidden: torch.Tensor,
    chunk: PromptChunk,
    logits_of: Callable[[torch.Tensor], torch.Tensor | None],
    most_rows: int,
) -> PromptLogprobs:
    """Of the chunk's tokens; empty where there are no logits, on other ranks than 0. All take part.

    hidden: [W, H] of the step. `logits_of` takes up to `most_rows` of them.
    """
    values: list[float] = []
    top: list[TopTokens] = []
    for start in range(0, len(chunk.targets), most_rows):
        targets = chunk.targets[start : start + most_rows]
        first = chunk.first + start
        logits = logits_of(hidden[first : first + len(targets)])
        if logits is not None:
            found, alternatives = token_logprobs(logits, targets, [chunk.top_n] * len(targets))
            values += found
            top += alternatives
    return PromptLogprobs(chunk.row_id, chunk.start, values, top)


def pooled(hidden: torch.Tensor, chunk: PooledChunk) -> PooledStates:
    """hidden: [W, H] of the step, the same on all ranks.

    In double precision, so that the sum does not show how the prompt was cut into chunks.
    """
    states = hidden[chunk.first : chunk.first + chunk.stop - chunk.start]
    sums = states.double().sum(0).tolist()
    return PooledStates(chunk.row_id, chunk.start, chunk.stop, sums)
