"""What a step brought to a request, read out of a `StepResult`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headgate.proto.messages import (
    PooledStates,
    Pooling,
    PromptLogprobs,
    RowEnd,
    StepResult,
    TopTokens,
)
from headgate.router.beam_search import Hypothesis
from headgate.router.request import Request


class ProtocolError(RuntimeError):
    """A result that does not answer the plan it names: router and shards disagree."""


@dataclass(slots=True)  # not frozen: one is made per token, and that makes it three times as dear
class RowOutput:
    """One request's part of a step's result."""

    request: Request
    token_id: int | None  # None: only prompt logprobs, or a failure
    logprob: float = 0.0
    top: TopTokens | None = None
    end: RowEnd = RowEnd.NONE
    failure: str = ""  # why a row ended FAILED; then there is no token
    prompt_logprobs: PromptLogprobs | None = None  # each position once, whatever was recomputed
    pooled: Sequence[float] | None = None  # the prompt's hidden state, if it ended POOLED
    hypotheses: Sequence[Hypothesis] = ()  # of a beam search that is done, best first

    def take_token(self, result: StepResult, place: int) -> None:
        """Appends the sampled token to the request; the router holds the limit on length too."""
        request = self.request
        self.end = result.ends[place]
        if self.end is RowEnd.FAILED:
            self.failure = result.failures.get(request.id, "no token could be chosen")
            return
        if self.end is RowEnd.POOLED:
            self.pooled = _pooled(request)
            return
        self.token_id = result.token_ids[place]
        self.logprob = result.logprobs[place]
        self.top = result.top[place] if result.top else None
        request.output_ids.append(self.token_id)
        if not self.end and len(request.output_ids) >= request.sampling.max_new_tokens:
            self.end = RowEnd.LENGTH

    def take_pooled(self, entry: PooledStates) -> None:
        """Adds a chunk's sum; a prompt that is computed anew begins anew."""
        request = self.request
        if request.num_pooled and entry.start == request.num_pooled:
            request.pooled_sum = [
                a + b for a, b in zip(request.pooled_sum, entry.sums, strict=True)
            ]
        else:
            request.pooled_sum = entry.sums
        request.num_pooled = entry.stop

    def take_prompt_logprobs(self, entry: PromptLogprobs) -> None:
        """Keeps the part that an earlier computation of the prompt has not brought already."""
        request, stop = self.request, entry.start + len(entry.logprobs)
        known = max(request.next_prompt_logprob - entry.start, 0)
        if known < len(entry.logprobs):
            request.next_prompt_logprob = stop
            self.prompt_logprobs = PromptLogprobs(
                entry.row, entry.start + known, entry.logprobs[known:], entry.top[known:]
            )


def _pooled(request: Request) -> list[float]:
    """Raises ProtocolError where not the whole prompt has come."""
    length = len(request.prompt_ids)
    if request.num_pooled != length:
        raise ProtocolError(f"request {request.id} has {request.num_pooled} of {length} positions")
    count = length if request.sampling.pooling is Pooling.MEAN else 1
    return [value / count for value in request.pooled_sum]
