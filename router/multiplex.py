"""One gateway's stream: many requests, keyed by the gateway, their events batched per step.

A task reads what the gateway says, the coroutine that serves it writes. Everything that became due
since the last write goes into one message, so a step costs one write whatever its size. When
the stream breaks, all of its requests are cancelled: the gateway submits them again.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable

from headgate.proto import router_pb2
from headgate.proto.token_columns import NO_LOGPROB, Row, encode_columns
from headgate.router.engine import Engine
from headgate.router.errors import RouterError, SlowClientError
from headgate.router.intake import Intake, Submission
from headgate.router.live_requests import LiveRequest, Sink
from headgate.router.output_processor import Outcome
from headgate.router.status import ServerStatus

logger = logging.getLogger(__name__)

MAX_HELD_EVENTS = 4096  # of a paused request; then it is cancelled
MAX_EVENTS_PER_MESSAGE = 4096
MAX_UNSENT_EVENTS = 65536  # of a gateway that stopped reading; then its stream is ended


class _Batch:
    """What goes out in one message: tokens in columns, then events."""

    __slots__ = ("events", "tokens")

    def __init__(self) -> None:
        self.tokens: list[Row] = []
        self.events: list[router_pb2.KeyedEvent] = []

    def __len__(self) -> int:
        return len(self.tokens) + len(self.events)


class KeyedRequest(Sink):
    """A request of this stream: the sink of its events, held back while it is paused."""

    def __init__(self, key: int, attempt: int, stream: MultiplexStream) -> None:
        self.key = key
        self.attempt = attempt
        self.live: LiveRequest | None = None
        self.task: asyncio.Task[None] | None = None  # while it is being validated
        self.unfinished = 0  # answers, once it is accepted
        self._stream = stream
        self._held: list[router_pb2.GenerateEvent] | None = None  # None: not paused
        self._overflowed = False
        self.last_event: _Batch | None = None  # where its last event is that is no column's

    def tokens(self, outcome: Outcome) -> None:
        """In columns where it may travel so (TokenColumns in router.proto)."""
        text, id_ = outcome.text, outcome.token_id
        plain = text == outcome.token_text and not outcome.special and not outcome.top
        if self._held is not None or not plain or id_ is None:
            self.send(router_pb2.GenerateEvent(tokens=outcome.tokens))
            return
        logprob = NO_LOGPROB if outcome.logprob is None else outcome.logprob
        self._stream.post_token(
            self,
            (
                self.key,
                self.attempt,
                outcome.index,
                outcome.position,
                outcome.text_offset,
                id_,
                logprob,
                text,
            ),
        )

    def send(self, event: router_pb2.GenerateEvent) -> None:
        if self._held is None:
            self._stream.post(self, event)
            return
        self._held.append(event)
        if len(self._held) > MAX_HELD_EVENTS and not self._overflowed:
            self._overflowed = True
            del self._held[:]
            self._stream.overflow(self)

    def pause(self) -> None:
        if self._held is None:
            self._held = []

    def resume(self) -> None:
        held, self._held = self._held or [], None
        for event in held:
            self._stream.post(self, event)


class MultiplexStream:
    """One connection of a gateway. `messages` yields what to write."""

    def __init__(self, engine: Engine, intake: Intake, status: ServerStatus) -> None:
        self._engine = engine
        self._intake = intake
        self._status = status
        self._requests: dict[int, KeyedRequest] = {}
        self._batches: deque[_Batch] = deque()  # the last one may grow
        self._unsent = 0  # events in all of them
        self._status_due = False
        self._closed = False
        self._wake = asyncio.Event()
        self.gateway_id = ""
        self.replaced = False  # by a newer stream of the same gateway

    async def follow(self, messages: AsyncIterator[router_pb2.ClientMessage]) -> None:
        """Takes what the gateway says, and closes when it says no more."""
        try:
            async for message in messages:
                self.take(message)
        except asyncio.CancelledError:
            raise
        except Exception:
            logger.exception("the stream of gateway %s failed", self.gateway_id)
        self.close()

    def take(self, message: router_pb2.ClientMessage) -> None:
        """One message of the gateway, after its Hello."""
        kind = message.WhichOneof("message")
        if kind == "submit":
            self._submit(message.submit)
        elif kind == "cancel":
            self._cancel(self._requests.pop(message.cancel, None))
        elif kind == "pause":
            if keyed := self._requests.get(message.pause):
                keyed.pause()
        elif kind == "resume":
            if keyed := self._requests.get(message.resume):
                keyed.resume()
        elif kind == "failure":
            self._intake.count_refusal(message.failure.error_type)
        else:
            logger.warning("a message of gateway %s is not understood", self.gateway_id)

    async def messages(self) -> AsyncGenerator[router_pb2.ServerMessage, None]:
        """Status first, then events and further status as they come; ends with `close`."""
        unsubscribe = self._status.subscribe(self._on_status)
        try:
            yield router_pb2.ServerMessage(status=self._status.message())
            while True:
                await self._wake.wait()
                self._wake.clear()
                while self._batches or self._status_due:
                    yield self._next_message()
                if self._closed:
                    return
        finally:
            unsubscribe()

    def close(self) -> None:
        """The gateway is gone: nobody reads the answers any more."""
        self._closed = True
        requests, self._requests = self._requests, {}
        for keyed in requests.values():
            self._cancel(keyed)
        self._batches.clear()
        self._wake.set()

    # ----------------------------------------------------------------- events

    def post(self, keyed: KeyedRequest, event: router_pb2.GenerateEvent) -> None:
        if self._closed or self._requests.get(keyed.key) is not keyed:
            return  # cancelled, or replaced by a later attempt
        # An end travels with its answer's last token, which a client gets in the same event.
        batch = self._batch(grow=event.HasField("finished"))
        batch.events.append(
            router_pb2.KeyedEvent(key=keyed.key, attempt=keyed.attempt, event=event)
        )
        keyed.last_event = batch
        if self._is_last(keyed, event):
            del self._requests[keyed.key]

    def post_token(self, keyed: KeyedRequest, row: Row) -> None:
        """As `post`, for a token that may travel in columns."""
        if self._closed or self._requests.get(keyed.key) is not keyed:
            return
        # In a message columns come first: they must not overtake an event of the same request.
        self._batch(keyed.last_event).tokens.append(row)

    def _batch(self, after: _Batch | None = None, *, grow: bool = False) -> _Batch:
        """The batch that takes one more event, later than `after`. `grow`: a full one as well."""
        self._unsent += 1
        if self._unsent > MAX_UNSENT_EVENTS:
            logger.error("gateway %s does not read: its stream is ended", self.gateway_id)
            self.close()
            return _Batch()  # which nobody sends
        batches = self._batches
        batch = batches[-1] if batches else None
        full = batch is not None and len(batch) >= MAX_EVENTS_PER_MESSAGE and not grow
        if batch is None or batch is after or full:
            batch = _Batch()
            batches.append(batch)
            self._wake.set()
        return batch

    @staticmethod
    def _is_last(keyed: KeyedRequest, event: router_pb2.GenerateEvent) -> bool:
        kind = event.WhichOneof("event")
        if kind == "accepted":
            keyed.unfinished = event.accepted.num_answers
        elif kind == "finished":
            keyed.unfinished -= 1
            return keyed.unfinished == 0
        return kind == "error"

    def overflow(self, keyed: KeyedRequest) -> None:
        """Its client reads too slowly: its place is wanted."""
        if keyed.live is not None:
            self._engine.fail(keyed.live, SlowClientError())

    def _next_message(self) -> router_pb2.ServerMessage:
        message = router_pb2.ServerMessage()
        if self._batches:
            batch = self._batches.popleft()
            self._unsent -= len(batch)
            message = router_pb2.ServerMessage(
                tokens=encode_columns(batch.tokens), events=batch.events
            )
        if self._status_due:
            self._status_due = False
            message.status.CopyFrom(self._status.message())
        return message

    def _on_status(self) -> None:
        self._status_due = True
        self._wake.set()

    # --------------------------------------------------------------- requests

    def _submit(self, submit: router_pb2.Submit) -> None:
        former = self._requests.get(submit.key)
        if former is not None:
            if former.attempt >= submit.attempt:
                return  # it is being answered already
            self._cancel(self._requests.pop(submit.key))
        keyed = KeyedRequest(submit.key, submit.attempt, self)
        self._requests[submit.key] = keyed
        submission = Submission(
            submit.request,
            resubmitted=submit.attempt > 1 or submit.HasField("delivered"),
            delivered=submit.delivered if submit.HasField("delivered") else None,
        )
        keyed.task = asyncio.get_running_loop().create_task(self._start(keyed, submission))

    async def _start(self, keyed: KeyedRequest, submission: Submission) -> None:
        try:
            keyed.live = await self._intake.submit(submission, keyed)
        except RouterError as error:
            keyed.send(router_pb2.GenerateEvent(error=error.to_proto()))
        finally:
            keyed.task = None

    def _cancel(self, keyed: KeyedRequest | None) -> None:
        if keyed is None:
            return
        if keyed.task is not None:
            keyed.task.cancel()
        if keyed.live is not None:
            self._engine.cancel(keyed.live)


class Streams:
    """The open streams by gateway: a gateway that comes back takes its former stream's place."""

    def __init__(self, make: Callable[[], MultiplexStream]) -> None:
        self._make = make
        self._open: dict[str, MultiplexStream] = {}

    def open(self, gateway_id: str) -> MultiplexStream:
        former = self._open.get(gateway_id)
        if former is not None:
            former.replaced = True
            former.close()
        stream = self._make()
        stream.gateway_id = gateway_id
        self._open[gateway_id] = stream
        logger.debug("gateway %s is connected", gateway_id)
        return stream

    def close(self, stream: MultiplexStream) -> None:
        stream.close()
        if self._open.get(stream.gateway_id) is stream:
            del self._open[stream.gateway_id]
