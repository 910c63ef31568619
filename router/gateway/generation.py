"""From requests to answers: submits calls and gathers them whole, or streams them as events.

The APIs differ only in their formatters. Everything here is cancelled when the client leaves.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar, Protocol

from headgate.proto import router_pb2
from headgate.router.errors import RouterError, ValidationError
from headgate.router.gateway.exchange import Exchange, Headers
from headgate.router.gateway.router_client import Call
from headgate.router.gateway.services import Services
from headgate.router.gateway.sse import COMMENT, EVENT_STREAM_HEADERS, EventWriter
from headgate.router.gateway.token import Token, token_of


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer."""

    accepted: router_pb2.Accepted
    tokens: Sequence[Token]
    finished: router_pb2.Finished
    prefill: Sequence[Token] = ()  # the prompt's tokens, where they were asked for


class Formatter(Protocol):
    """The events of one answer, in one API's shape."""

    def token(self, token: Token, text: str) -> bytes:
        """A token and the text it released (which may be that of earlier ones)."""

    def last(self, token: Token | None, text: str, finished: router_pb2.Finished) -> bytes:
        """The end, with the last token unless that has been sent already."""


# -------------------------------------------------------------------- whole


class _Collector:
    """Sink of a call whose answers are sent as a whole."""

    def __init__(self, num_answers: int) -> None:
        self.result: asyncio.Future[list[router_pb2.Finished]] = (
            asyncio.get_running_loop().create_future()
        )
        self._num_answers = num_answers
        self._ends: list[router_pb2.Finished] = []

    def tokens(self, index: int, tokens: Sequence[Token], text: str) -> None:
        """The call itself keeps what was delivered."""

    def finished(self, finished: router_pb2.Finished) -> None:
        self._ends.append(finished)
        if len(self._ends) == self._num_answers and not self.result.done():
            self.result.set_result(sorted(self._ends, key=lambda end: end.index))

    def failed(self, error: RouterError) -> None:
        if not self.result.done():
            self.result.set_exception(error)
            self.result.exception()  # marks it as seen: the client may have left

    def flush(self) -> None:
        """Nothing is sent before the end."""


async def collect(
    services: Services, exchange: Exchange, requests: Sequence[router_pb2.GenerateRequest]
) -> list[Answer]:
    """The answers in the order of the requests, `num_answers` of each.

    Raises RouterError, ClientGoneError.
    """
    calls: list[tuple[Call, _Collector]] = []
    try:
        for request in requests:
            sink = _Collector(num_answers(request))
            calls.append((services.client.submit(request, sink), sink))
        exchange.submitted = True
        accepted = await exchange.until(asyncio.gather(*(call.accepted for call, _ in calls)))
        finished = await exchange.until(asyncio.gather(*(sink.result for _, sink in calls)))
        answers: list[Answer] = []
        for begin, (call, _), ends in zip(accepted, calls, finished, strict=True):
            prefill = tuple(map(token_of, ends[0].prefill))
            answers += [
                Answer(begin, answer.tokens, end, prefill)
                for answer, end in zip(call.answers, ends, strict=True)
            ]
        return answers
    finally:
        for call, _ in calls:
            services.client.cancel(call)


def num_answers(request: router_pb2.GenerateRequest) -> int:
    """How many the request's call will bring."""
    return max(request.parameters.n, 1)


def check_num_answers(n: int, info: router_pb2.InfoResponse) -> None:
    """Raises ValidationError for an `n` out of range, before anything is made `n` times."""
    limit = info.max_concurrent_requests
    if not 0 < n <= limit:
        raise ValidationError(f"`n` must be > 0 and <= {limit}. Given: {n}", field="n")


# ------------------------------------------------------------------ streams


class AnswerStream:
    """Answers of one or several calls on one event stream."""

    media_headers: ClassVar[Headers] = EVENT_STREAM_HEADERS
    keep_alive: ClassVar[bytes] = COMMENT

    def __init__(self, services: Services, exchange: Exchange) -> None:
        self._services = services
        self._exchange = exchange
        self._calls: list[Call] = []
        self._sinks: list[_StreamSink] = []
        self._open = 0  # answers that have not ended
        self._writer = EventWriter(
            exchange.send_body,
            self,
            services.config.write_buffer_limit,
            self.keep_alive,
            exchange.write_chunk,
        )

    def tail(self, finished: Sequence[router_pb2.Finished]) -> bytes:
        """What follows the last answer; `finished` is empty after an error."""
        return b""

    def error_event(self, error: RouterError) -> bytes:
        """An error after the response has begun."""
        raise NotImplementedError

    async def run(
        self, requests: Sequence[router_pb2.GenerateRequest], formatters: Sequence[Formatter]
    ) -> None:
        """Streams until the end. `formatters`: one for each answer, in the order of `collect`.

        Raises RouterError only before the response has begun.
        """
        client, housekeeper = self._services.client, self._services.housekeeper
        of_answers = iter(formatters)
        self._sinks = [
            _StreamSink(self, self._writer, list(islice(of_answers, num_answers(request))))
            for request in requests
        ]
        self._open = len(formatters)
        try:
            for request, sink in zip(requests, self._sinks, strict=True):
                self._calls.append(client.submit(request, sink))
            self._exchange.submitted = True
            accepted = await self._exchange.until(
                asyncio.gather(*(call.accepted for call in self._calls))
            )
            await self._exchange.start(200, self._headers(accepted))
            housekeeper.add(self._writer)
            self._writer.open()
            await self._exchange.until(self._writer.done)
        finally:
            housekeeper.remove(self._writer)
            self._cancel()

    def _headers(self, accepted: Sequence[router_pb2.Accepted]) -> Headers:
        characters = sum(entry.prompt_characters for entry in accepted)
        return [
            *self.media_headers,
            _compute_type(self._services),
            (b"x-compute-characters", b"%d" % characters),
        ]

    def _cancel(self) -> None:
        for call in self._calls:
            self._services.client.cancel(call)

    def write(self, data: bytes) -> None:
        self._writer.write(data)

    # What the sinks call:

    def ended(self) -> None:
        """One of the answers is complete."""
        self._open -= 1
        if self._open == 0:
            self._writer.write(self.tail([end for sink in self._sinks for end in sink.ends]))
            self._writer.close()

    # What the writer calls:

    def pause(self) -> None:
        for call in self._calls:
            self._services.client.pause(call)

    def resume(self) -> None:
        for call in self._calls:
            self._services.client.resume(call)

    def abort(self, error: RouterError) -> None:
        """Ends the stream with an error event; the other answers are cancelled."""
        self._cancel()
        for call in self._calls:
            call.refuse(error)  # where the response has not begun, the error is its status
        self._writer.write(self.error_event(error) + self.tail(()))
        self._writer.close()


class _StreamedAnswer:
    """One answer of a call. Its last token is held, to travel in the same event as the end."""

    __slots__ = ("_formatter", "_text", "_token", "_write")

    def __init__(self, write: Callable[[bytes], None], formatter: Formatter) -> None:
        self._write = write
        self._formatter = formatter
        self._token: Token | None = None
        self._text = ""

    def tokens(self, tokens: Sequence[Token], text: str) -> None:
        for token in tokens:
            self.write_token()
            self._token = token
        self._text += text

    def finished(self, finished: router_pb2.Finished) -> None:
        self._write(self._formatter.last(self._token, self._text, finished))
        self._token = None

    def write_token(self) -> None:
        if self._token is not None:
            self._write(self._formatter.token(self._token, self._text))
            self._token, self._text = None, ""


class _StreamSink:
    """Sink of one call's answers."""

    __slots__ = ("_answers", "_flush", "_stream", "ends")

    def __init__(
        self, stream: AnswerStream, writer: EventWriter, formatters: Sequence[Formatter]
    ) -> None:
        self._stream = stream
        self._flush = writer.flush
        self._answers = [_StreamedAnswer(writer.write, formatter) for formatter in formatters]
        self.ends: list[router_pb2.Finished] = []

    def tokens(self, index: int, tokens: Sequence[Token], text: str) -> None:
        self._answers[index].tokens(tokens, text)

    def finished(self, finished: router_pb2.Finished) -> None:
        self.ends.append(finished)
        self._answers[finished.index].finished(finished)
        self._stream.ended()

    def failed(self, error: RouterError) -> None:
        self._write_tokens()
        self._stream.abort(error)

    def flush(self) -> None:
        self._write_tokens()
        self._flush()

    def _write_tokens(self) -> None:
        for answer in self._answers:
            answer.write_token()


# ------------------------------------------------------------------ headers


def timing_headers(
    services: Services, exchange: Exchange, answers: Sequence[Answer], *, compute_time: bool
) -> Headers:
    """TGI's x- headers of a whole response.

    Counts and milliseconds are sums over the prompts; answers to the same prompt wait together,
    and their inference counts for each.
    """
    ends = [answer.finished for answer in answers]
    prompts = [answer for answer in answers if answer.finished.index == 0]
    total = time.monotonic() - exchange.started_at
    generated = sum(end.generated_tokens for end in ends)
    inference = sum(end.timings.inference for end in ends)
    waits = [answer.finished.timings for answer in prompts]
    numbers = {
        b"x-compute-characters": sum(answer.accepted.prompt_characters for answer in prompts),
        b"x-total-time": int(total * 1e3),
        b"x-validation-time": _milliseconds(sum(timings.validation for timings in waits)),
        b"x-queue-time": _milliseconds(sum(timings.queue for timings in waits)),
        b"x-inference-time": _milliseconds(inference),
        b"x-time-per-token": _milliseconds(inference // max(generated, 1)),
        b"x-prompt-tokens": sum(answer.finished.input_tokens for answer in prompts),
        b"x-generated-tokens": generated,
    }
    headers: Headers = [(name, b"%d" % value) for name, value in numbers.items()]
    headers.append(_compute_type(services))
    if compute_time:
        headers.append((b"x-compute-time", b"%.6f" % total))
    return headers


def _compute_type(services: Services) -> tuple[bytes, bytes]:
    return b"x-compute-type", services.config.compute_type.encode("latin-1", "replace")


def _milliseconds(nanoseconds: int) -> int:
    return nanoseconds // 1_000_000
