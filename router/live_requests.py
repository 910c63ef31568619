"""The requests a router is working for: how many answers may live at once, and each one's books.

Counts and times; it schedules nothing and knows no tokens.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

from headgate.proto import router_pb2
from headgate.router.errors import OverloadedError
from headgate.router.grammar import Grammar
from headgate.router.metrics import RequestTimes
from headgate.router.output_processor import Answer, Outcome
from headgate.router.request import Request
from headgate.router.sampling_params import SamplingParams
from headgate.router.validation import ValidRequest

logger = logging.getLogger(__name__)

_PARAMETER_FIELDS = fields(SamplingParams)
_MAX_SHOWN = 64  # characters of a text, entries of a list, in a log line
REMEMBERED = 64  # durations of ended requests, to foretell when there will be room


class Sink(Protocol):
    """Where the events of a request go, in order; `finished` or `error` is the last."""

    def send(self, event: router_pb2.GenerateEvent) -> None:
        """Must not block and not raise."""

    def tokens(self, outcome: Outcome) -> None:
        """As `send`, for a token: sinks of many requests have a cheaper way."""
        self.send(router_pb2.GenerateEvent(tokens=outcome.tokens))


class Permit:
    """The right to have some answers live. Held from before validation to the last one's end."""

    def __init__(self, limiter: Limiter, num_answers: int) -> None:
        self._limiter: Limiter | None = limiter
        self._num_answers = num_answers
        self._since = time.monotonic()

    def release(self) -> None:
        """Idempotent."""
        if self._limiter is not None:
            self._limiter.give_back(self._num_answers, time.monotonic() - self._since)
            self._limiter = None


class Limiter:
    """Lets at most `limit` answers live at a time, over all gateways."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._durations: deque[float] = deque(maxlen=REMEMBERED)
        self.num_live = 0

    def acquire(self, num_answers: int) -> Permit:
        """For all of a request's answers at once. Raises OverloadedError, never waits.

        A request for more than there can ever be passes with none, for validation to refuse it.
        """
        if num_answers > self._limit:
            num_answers = 0
        if self.num_live + num_answers > self._limit:
            raise OverloadedError(retry_after=self._retry_after())
        self.num_live += num_answers
        return Permit(self, num_answers)

    def give_back(self, num_answers: int, duration: float) -> None:
        self.num_live -= num_answers
        self._durations.append(duration)

    def _retry_after(self) -> float:
        """Seconds in which about a quarter of what is live will have ended; at least 1."""
        if not self._durations:
            return 1.0
        return float(max(1, math.ceil(sum(self._durations) / len(self._durations) / 4)))


@dataclass(slots=True, eq=False)
class LiveAnswer:
    """One of a request's answers: ids, text and times (time.monotonic())."""

    live: LiveRequest
    request: Request
    text: Answer
    first_token: float | None = None
    last_token: float | None = None
    score: float | None = None  # of a beam

    @property
    def index(self) -> int:
        """Among the request's answers."""
        return self.request.sampling.sample_index


@dataclass(slots=True, eq=False)
class LiveRequest:
    """One accepted request: its answers, the way to its client, and its times."""

    valid: ValidRequest
    sink: Sink
    permit: Permit
    answers: list[LiveAnswer] = field(default_factory=list)
    num_open: int = 0  # answers that have not ended
    queued: float = field(default_factory=time.monotonic)
    ended: bool = False

    @property
    def num_tokens(self) -> int:
        """Of all answers."""
        return sum(answer.text.num_tokens for answer in self.answers)

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that the prefix cache had; the answers after the first share its."""
        return self.answers[0].request.num_cached_tokens

    def times(self, now: float) -> RequestTimes:
        """Phases that were not reached are 0 long."""
        started = self.answers[0].request.first_scheduled
        inference = 0.0 if started is None else max(now - started, 0.0)
        longest = max(answer.text.num_tokens for answer in self.answers)
        return RequestTimes(
            total=now - self.valid.arrival,
            validation=self.queued - self.valid.arrival,
            queue=max((now if started is None else started) - self.queued, 0.0),
            inference=inference,
            per_token=inference / max(longest, 1),
        )

    def timings(self, answer: LiveAnswer, now: float) -> router_pb2.Timings:
        times = self.times(now)
        first = answer.first_token
        return router_pb2.Timings(
            validation=_nanoseconds(times.validation),
            queue=_nanoseconds(times.queue),
            inference=_nanoseconds(times.inference),
            time_to_first_token=0 if first is None else _nanoseconds(first - self.valid.arrival),
        )

    def _given_parameters(self) -> dict[str, Any]:
        given = ((f.name, getattr(self.valid.parameters, f.name)) for f in _PARAMETER_FIELDS)
        return {name: _shown(value) for name, value in given if value not in (None, ())}

    def log_end(self, outcome: str, now: float, log_prompts: bool) -> None:
        """One line: `outcome` is the finish reason or the error type."""
        times = self.times(now)
        line: dict[str, Any] = {
            "request_id": self.valid.request_id,
            "outcome": outcome,
            "parameters": self._given_parameters(),
            "seed": self.valid.seed,
            "input_tokens": len(self.valid.prompt_ids),
            "cached_tokens": self.num_cached_tokens,
            "generated_tokens": self.num_tokens,
            "validation_ms": _milliseconds(times.validation),
            "queue_ms": _milliseconds(times.queue),
            "inference_ms": _milliseconds(times.inference),
            "per_token_ms": _milliseconds(times.per_token),
            "total_ms": _milliseconds(times.total),
        }
        first = [answer.first_token for answer in self.answers if answer.first_token is not None]
        if first:
            line["first_token_ms"] = _milliseconds(min(first) - self.valid.arrival)
        for name in ("preemptions", "recoveries"):
            if count := sum(getattr(answer.request, name) for answer in self.answers):
                line[name] = count
        if log_prompts:
            line["prompt"] = self.valid.prompt_text or self.valid.prompt_ids
            line["answers"] = [answer.text.text for answer in self.answers]
        logger.info("request", extra={"fields": line})


def _shown(value: Any) -> Any:
    """Numbers that travelled as float32 without the digits that this added; only so much text."""
    if isinstance(value, Grammar):
        return str(value)
    if isinstance(value, tuple):
        return [_shown(entry) for entry in value[:_MAX_SHOWN]]
    if isinstance(value, str):
        return value[:_MAX_SHOWN]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _nanoseconds(seconds: float) -> int:
    return max(int(seconds * 1e9), 0)


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1e3, 2)
