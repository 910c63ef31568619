"""What a step brought to a request, read out of a `StepResult`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

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


@dataclass(eq=False)
class RowOutput:
    """One request's part of a step's result.

    One is made per token: neither frozen nor with slots, so that what it does not have costs
    nothing, being the class's.
    """

    request: Request
    token_id: int | None = field(default=None, init=False)  # None: no token, or a failure
    logprob: float = field(default=0.0, init=False)
    top: TopTokens | None = field(default=None, init=False)
    end: RowEnd = field(default=RowEnd.NONE, init=False)
    failure: str = field(default="", init=False)  # why a row ended FAILED; then it has no token
    # Each position once, whatever was recomputed.
    prompt_logprobs: PromptLogprobs | None = field(default=None, init=False)
    # The prompt's hidden state, if it ended POOLED.
    pooled: Sequence[float] | None = field(default=None, init=False)
    # Of a beam search that is done, best first.
    hypotheses: Sequence[Hypothesis] = field(default=(), init=False)

    def take_token(self, result: StepResult, place: int) -> None:
        """Appends the sampled token to the request; the router holds the limit on length too."""
        request, end = self.request, result.ends[place]
        if end:
            self.end = end
            if end is RowEnd.FAILED:
                self.failure = result.failures.get(request.id, "no token could be chosen")
                return
            if end is RowEnd.POOLED:
                self.pooled = _pooled(request)
                return
        self.token_id = token_id = result.token_ids[place]
        self.logprob = result.logprobs[place]
        if result.top:
            self.top = result.top[place]
        request.output_ids.append(token_id)
        if not end and len(request.output_ids) >= request.sampling.max_new_tokens:
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


def more_tokens(request: Request, result: StepResult, places: Iterable[int]) -> list[RowOutput]:
    """Guesses that were right."""
    outputs = []
    for place in places:
        output = RowOutput(request)
        output.take_token(result, place)
        outputs.append(output)
    return outputs


def _pooled(request: Request) -> list[float]:
    """Raises ProtocolError where not the whole prompt has come."""
    length = len(request.prompt_ids)
    if request.num_pooled != length:
        raise ProtocolError(f"request {request.id} has {request.num_pooled} of {length} positions")
    count = length if request.sampling.pooling is Pooling.MEAN else 1
    return [value / count for value in request.pooled_sum]
