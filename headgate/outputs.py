"""What `LLM.generate` gives back, under vLLM's names, made from the router's answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headgate.proto import router_pb2

STOP_SEQUENCE = router_pb2.FINISH_REASON_STOP_SEQUENCE
LENGTH = router_pb2.FINISH_REASON_LENGTH


@dataclass(slots=True)
class Logprob:
    """Natural log of a token's probability, before penalties, temperature and filters."""

    logprob: float
    rank: int | None = None  # from 1; None: not among the alternatives that were asked for
    decoded_token: str | None = None


Logprobs = list[dict[int, Logprob]]  # one entry per token, by token id
PromptLogprobs = list[dict[int, Logprob] | None]  # the first token has none


@dataclass(slots=True)
class CompletionOutput:
    """One answer."""

    index: int
    text: str
    token_ids: list[int]  # the token that ended the answer included
    cumulative_logprob: float | None  # None where no logprobs were asked for, as `logprobs`
    logprobs: Logprobs | None
    finish_reason: str | None = None  # "stop" or "length"
    stop_reason: int | str | None = None  # the stop text or token id; None: end of sequence

    def finished(self) -> bool:
        """Always so here: answers are given back whole."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """A prompt with its answers, `n` of them in `outputs`."""

    request_id: str
    prompt: str | None  # None: it came as token ids without a text
    prompt_token_ids: list[int]
    prompt_logprobs: PromptLogprobs | None
    outputs: list[CompletionOutput]
    finished: bool = True
    num_cached_tokens: int | None = None  # prompt tokens that came from the prefix cache


@dataclass(slots=True)
class PoolingOutput:
    """A prompt's embedding."""

    data: list[float]  # hidden_size of them

    @property
    def embedding(self) -> list[float]:
        """The same, under vLLM's other name."""
        return self.data


@dataclass(slots=True)
class PoolingRequestOutput:
    """A prompt with its embedding."""

    request_id: str
    outputs: PoolingOutput
    prompt_token_ids: list[int]
    finished: bool = True
    num_cached_tokens: int | None = None  # prompt tokens that came from the prefix cache


def pooling_output(
    request_id: str, prompt_token_ids: list[int], response: router_pb2.GenerateResponse
) -> PoolingRequestOutput:
    finished = response.finished
    return PoolingRequestOutput(
        request_id=request_id,
        outputs=PoolingOutput(list(finished.embedding)),
        prompt_token_ids=prompt_token_ids,
        num_cached_tokens=finished.cached_tokens,
    )


def request_output(
    request_id: str,
    prompt: str | None,
    prompt_token_ids: list[int],
    response: router_pb2.GenerateResponse,
    *,
    logprobs: int | None,
    prompt_logprobs: int | None,
    detokenize: bool = True,
) -> RequestOutput:
    """`logprobs`, `prompt_logprobs`: what was asked for, None for nothing."""
    finished = response.finished
    return RequestOutput(
        request_id=request_id,
        prompt=prompt,
        prompt_token_ids=prompt_token_ids,
        prompt_logprobs=(
            None
            if prompt_logprobs is None
            else [_entry(token, prompt_logprobs) for token in finished.prefill]
        ),
        outputs=[
            _completion(answer.tokens, answer.finished, logprobs, detokenize)
            for answer in (response, *response.others)
        ],
        num_cached_tokens=finished.cached_tokens,
    )


def _completion(
    tokens: Sequence[router_pb2.Token],
    finished: router_pb2.Finished,
    logprobs: int | None,
    detokenize: bool,
) -> CompletionOutput:
    asked = logprobs is not None
    chosen = [entry for token in tokens if (entry := _entry(token, logprobs)) is not None]
    return CompletionOutput(
        index=finished.index,
        text=finished.generated_text if detokenize else "",
        token_ids=[token.id for token in tokens],
        cumulative_logprob=sum(token.logprob for token in tokens) if asked else None,
        logprobs=chosen if asked else None,
        finish_reason="length" if finished.reason == LENGTH else "stop",
        stop_reason=_stop_reason(finished, tokens),
    )


def _entry(token: router_pb2.Token, alternatives: int | None) -> dict[int, Logprob] | None:
    """The chosen token first, then the likeliest; None where it has no logprob."""
    if alternatives is None or not token.HasField("logprob"):
        return None
    entry = {token.id: Logprob(token.logprob, None, token.text)}
    for rank, other in enumerate(token.top[:alternatives], start=1):
        if other.id == token.id:
            entry[token.id].rank = rank
        else:
            entry[other.id] = Logprob(other.logprob, rank, other.text)
    return entry


def _stop_reason(
    finished: router_pb2.Finished, tokens: Sequence[router_pb2.Token]
) -> int | str | None:
    if finished.reason != STOP_SEQUENCE:
        return None
    return finished.stop_sequence or tokens[-1].id
