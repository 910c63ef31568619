"""The public gRPC service: converts between messages and the engine. No policy.

Errors of unary calls and plain streams become gRPC statuses with the typed `Error` in the
trailing metadata; on Multiplex they are events.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import NoReturn, TypeAlias

import grpc

from headgate.proto import router_pb2, router_pb2_grpc
from headgate.router.engine import Engine
from headgate.router.errors import (
    IncompleteGenerationError,
    ReplacedError,
    RouterError,
    SlowClientError,
    ValidationError,
    from_proto,
)
from headgate.router.intake import Intake, Submission
from headgate.router.live_requests import LiveRequest, Sink
from headgate.router.metrics import Metrics
from headgate.router.multiplex import Streams
from headgate.router.status import ServerStatus
from headgate.router.tokenizer import Span, Tokenizer

logger = logging.getLogger(__name__)

SERVICE_NAME = router_pb2.DESCRIPTOR.services_by_name["Router"].full_name
MAX_UNREAD_EVENTS = 4096  # of a plain stream; then it is ended

Context: TypeAlias = grpc.aio.ServicerContext


class EventQueue(Sink):
    """The sink of a call of its own: events in order, unread ones bounded where `limit` is set."""

    def __init__(self, engine: Engine, limit: int = 0) -> None:
        self._engine = engine
        self._limit = limit
        self._events: deque[router_pb2.GenerateEvent] = deque()
        self._ready = asyncio.Event()
        self.live: LiveRequest | None = None

    def send(self, event: router_pb2.GenerateEvent) -> None:
        self._events.append(event)
        self._ready.set()
        if self._limit and len(self._events) > self._limit and self.live is not None:
            self._engine.fail(self.live, SlowClientError())

    async def events(self) -> AsyncIterator[router_pb2.GenerateEvent]:
        """Up to the last `finished`. Raises RouterError for an error event."""
        unfinished = 0
        while True:
            while not self._events:
                self._ready.clear()
                await self._ready.wait()
            event = self._events.popleft()
            kind = event.WhichOneof("event")
            if kind == "error":
                raise from_proto(event.error)
            yield event
            if kind == "accepted":
                unfinished = event.accepted.num_answers
            elif kind == "finished":
                unfinished -= 1
                if not unfinished:
                    return


class RouterService(router_pb2_grpc.RouterServicer):
    """headgate.router.v1.Router."""

    def __init__(
        self,
        engine: Engine,
        intake: Intake,
        status: ServerStatus,
        tokenizer: Tokenizer,
        metrics: Metrics,
        streams: Streams,
    ) -> None:
        self._engine = engine
        self._intake = intake
        self._status = status
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._streams = streams

    async def Generate(
        self, request: router_pb2.GenerateRequest, context: Context
    ) -> router_pb2.GenerateResponse:
        response = router_pb2.GenerateResponse()
        try:
            async with contextlib.aclosing(
                self._generate(request, EventQueue(self._engine))
            ) as all_:
                async for event in all_:
                    _add(event, response)
        except RouterError as error:
            await abort(context, error)
        answers = (response, *response.others)
        if not all(answer.HasField("finished") for answer in answers):
            await abort(context, IncompleteGenerationError())
        return response

    async def GenerateStream(
        self, request: router_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[router_pb2.GenerateEvent]:
        queue = EventQueue(self._engine, MAX_UNREAD_EVENTS)
        try:
            async with contextlib.aclosing(self._generate(request, queue)) as events:
                async for event in events:
                    yield event
        except RouterError as error:
            await abort(context, error)

    async def Multiplex(
        self, request_iterator: AsyncIterator[router_pb2.ClientMessage], context: Context
    ) -> AsyncIterator[router_pb2.ServerMessage]:
        async for message in request_iterator:
            if message.WhichOneof("message") != "hello":
                await abort(context, ValidationError("the first message must be `hello`"))
            break
        else:
            return
        stream = self._streams.open(message.hello.gateway_id)
        reader = asyncio.ensure_future(stream.follow(request_iterator))
        try:
            async with contextlib.aclosing(stream.messages()) as messages:
                async for answer in messages:
                    yield answer
            if stream.replaced:
                await abort(context, ReplacedError())
        finally:
            reader.cancel()
            self._streams.close(stream)

    async def Tokenize(
        self, request: router_pb2.TokenizeRequest, context: Context
    ) -> router_pb2.TokenizeResponse:
        special = request.add_special_tokens or not request.HasField("add_special_tokens")
        try:
            spans = await self._tokenizer.spans(request.text, add_special_tokens=special)
        except Exception as error:  # tokenizers raises plain Exception
            await abort(context, ValidationError(f"tokenizer error {error}", field="inputs"))
        # A long text has a million of them: too much for the loop that feeds the shards.
        return await asyncio.to_thread(_tokenize_response, spans)

    async def Cancel(
        self, request: router_pb2.CancelRequest, context: Context
    ) -> router_pb2.CancelResponse:
        if not request.request_id:
            await abort(
                context, ValidationError("`request_id` cannot be empty", field="request_id")
            )
        return router_pb2.CancelResponse(cancelled=self._intake.cancel(request.request_id))

    async def Info(
        self, request: router_pb2.InfoRequest, context: Context
    ) -> router_pb2.InfoResponse:
        return self._status.info()

    async def Metrics(
        self, request: router_pb2.MetricsRequest, context: Context
    ) -> router_pb2.MetricsResponse:
        self._engine.refresh_gauges()
        return router_pb2.MetricsResponse(text=self._metrics.render())

    async def _generate(
        self, request: router_pb2.GenerateRequest, queue: EventQueue
    ) -> AsyncGenerator[router_pb2.GenerateEvent, None]:
        """The events of one request, which is cancelled if they are not read to the end."""
        queue.live = await self._intake.submit(Submission(request), queue)
        try:
            async for event in queue.events():
                yield event
        finally:
            self._engine.cancel(queue.live)


async def abort(context: Context, error: RouterError) -> NoReturn:
    await context.abort(error.grpc_code, error.message, trailing_metadata=error.metadata())
    raise AssertionError("abort raises")


def _add(event: router_pb2.GenerateEvent, response: router_pb2.GenerateResponse) -> None:
    """Puts an event into its place in a whole response."""
    kind = event.WhichOneof("event")
    if kind == "accepted":
        response.accepted.CopyFrom(event.accepted)
        for _ in range(1, event.accepted.num_answers):
            response.others.add()
        return
    index = event.tokens.index if kind == "tokens" else event.finished.index
    answer = response.others[index - 1] if index else response
    if kind == "tokens":
        answer.tokens.extend(event.tokens.tokens)
    else:
        answer.finished.CopyFrom(event.finished)


def _tokenize_response(spans: Sequence[Span]) -> router_pb2.TokenizeResponse:
    return router_pb2.TokenizeResponse(
        tokens=[
            router_pb2.TokenSpan(id=span.id, text=span.text, start=span.start, stop=span.stop)
            for span in spans
        ]
    )
