"""The one stream to the router: submits, demultiplexes, and submits again when the router died.

A `Call` is one request in flight, a `Sink` what takes its events. Events are handed over
synchronously while a message is read, then every touched sink is flushed once: no task wakes
per token. Knows neither HTTP nor JSON.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc

from headgate.proto import router_pb2, router_pb2_grpc
from headgate.proto.framing import MAX_MESSAGE_BYTES, frame, read_message, stream_path
from headgate.proto.token_columns import decode_columns
from headgate.router.errors import (
    InternalError,
    OverloadedError,
    RouterError,
    UnavailableError,
    from_proto,
    from_rpc_error,
)
from headgate.router.gateway.config import GatewayConfig
from headgate.router.gateway.server_state import ServerState, State
from headgate.router.gateway.token import Token, token_of

logger = logging.getLogger(__name__)

_FIRST_BACKOFF = 0.05  # seconds
_LAST_BACKOFF = 1.0
_MOST_HELD = 128  # requests, before a router has told its own limit
_UNARY_TIMEOUT = 30.0
_CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.enable_http_proxy", 0),
]


class Sink(Protocol):
    """Takes a call's events, in order, without waiting. The last is `failed`, or `finished` of the
    last answer to end. `index`: of the answer among the call's.
    """

    def tokens(self, index: int, tokens: Sequence[Token], text: str) -> None: ...

    def finished(self, finished: router_pb2.Finished) -> None: ...

    def failed(self, error: RouterError) -> None: ...

    def flush(self) -> None:
        """All events that arrived together have been handed over."""


@dataclass(slots=True)
class CallAnswer:
    """What was delivered of one of a call's answers."""

    tokens: list[Token] = field(default_factory=list)
    text_offset: int = 0  # characters
    finished: bool = False

    def take(
        self, position: int, tokens: Sequence[Token], text: str, offset: int
    ) -> tuple[Sequence[Token], str]:
        """Keeps what its client does not have yet, and gives it.

        `position` and `offset`: tokens and characters of the answer before these.
        """
        known = len(self.tokens) - position
        if known > 0:  # a new router began before what the client has
            tokens = tokens[known:]
        if offset < self.text_offset:
            text = text[self.text_offset - offset :]
        self.tokens.extend(tokens)
        self.text_offset += len(text)
        return tokens, text


class Call:
    """One request at the router, with what it takes to submit it again."""

    __slots__ = (
        "accepted", "answers", "attempt", "ended", "key", "paused", "request", "seed", "sent",
        "sink", "unfinished", "waiting_since",
    )  # fmt: skip

    def __init__(self, key: int, request: router_pb2.GenerateRequest, sink: Sink) -> None:
        self.key = key
        self.attempt = 0
        self.request = request
        self.sink = sink
        self.accepted: asyncio.Future[router_pb2.Accepted] = (
            asyncio.get_running_loop().create_future()
        )
        self.answers: list[CallAnswer] = []  # once it is accepted
        self.unfinished = 0  # of them
        self.seed: int | None = None
        self.sent = False  # on the stream that is open now
        self.paused = False
        self.ended = False
        self.waiting_since: float | None = None  # when it began to wait for a router

    def fail(self, error: RouterError) -> None:
        """Ends the call: by refusing it, or by the sink where it had been accepted."""
        self.ended = True
        if not self.refuse(error) and not self.accepted.cancelled():
            self.sink.failed(error)
            self.sink.flush()

    def refuse(self, error: RouterError) -> bool:
        """Ends the wait for `accepted`; False where there is none any more."""
        if self.accepted.done():
            return False
        self.accepted.set_exception(error)
        self.accepted.exception()  # marks it as seen: its client may have left already
        return True


class RouterClient:
    """The gateway's end of its stream, reconnecting for ever; other calls go through gRPC."""

    def __init__(self, config: GatewayConfig, state: ServerState) -> None:
        self.state = state
        self._address = config.router_address
        self._timeout = config.router_timeout
        # The router asks every caller for the key; the gateway has checked its own clients'.
        key = config.api_key
        self._metadata = (("authorization", f"Bearer {key}"),) if key else ()
        index = os.environ.get("HEADGATE_GATEWAY_INDEX", "0")
        self._hello = router_pb2.Hello(
            gateway_id=f"gateway-{index}-{uuid.uuid4().hex}", api_key=key
        )
        self._calls: dict[int, Call] = {}
        self._keys = itertools.count(1)
        self._writer: asyncio.StreamWriter | None = None  # None: no stream
        self._stub: router_pb2_grpc.RouterStub | None = None
        self._task: asyncio.Task[None] | None = None

    # ------------------------------------------------------------- requests

    def submit(self, request: router_pb2.GenerateRequest, sink: Sink) -> Call:
        """Sends the request, or keeps it until a router takes it.

        Raises what `refusal` gives, and OverloadedError where too many wait for a router.
        """
        refusal = self.state.refusal()
        if refusal is not None:
            raise refusal
        connected = self._writer is not None and self.state.router_takes_requests
        if not connected and len(self._calls) >= self._most_held():
            raise OverloadedError(retry_after=1.0)
        call = Call(next(self._keys), request, sink)
        self._calls[call.key] = call
        if connected:
            self._send_call(call)
        else:
            call.waiting_since = time.monotonic()
        return call

    def _most_held(self) -> int:
        """As many requests as the router itself would take."""
        info = self.state.info
        return (info.max_concurrent_requests if info else 0) or _MOST_HELD

    def cancel(self, call: Call) -> None:
        """Forgets the call and tells the router. Nothing happens to one that has ended."""
        if self._calls.pop(call.key, None) is None:
            return
        call.ended = True
        if call.sent:
            self._post(router_pb2.ClientMessage(cancel=call.key))

    def pause(self, call: Call) -> None:
        """Asks the router to hold the call's events back."""
        if not call.ended and not call.paused:
            call.paused = True
            if call.sent:
                self._post(router_pb2.ClientMessage(pause=call.key))

    def resume(self, call: Call) -> None:
        if not call.ended and call.paused:
            call.paused = False
            if call.sent:
                self._post(router_pb2.ClientMessage(resume=call.key))

    def count_failure(self, error_type: str) -> None:
        """Has the router count a request that this gateway refused."""
        self._post(router_pb2.ClientMessage(failure=router_pb2.Failure(error_type=error_type)))

    async def tokenize(
        self, text: str, *, add_special_tokens: bool = True
    ) -> Sequence[router_pb2.TokenSpan]:
        """Raises RouterError."""
        request = router_pb2.TokenizeRequest(text=text, add_special_tokens=add_special_tokens)
        answer = await self._ask(self._connected().Tokenize, request)
        return answer.tokens

    async def metrics(self) -> bytes:
        """The router's registry in Prometheus' text format. Raises RouterError."""
        answer = await self._ask(self._connected().Metrics, router_pb2.MetricsRequest())
        return answer.text

    async def cancel_by_id(self, request_id: str) -> int:
        """Ends requests of any gateway; how many there were. Raises RouterError."""
        request = router_pb2.CancelRequest(request_id=request_id)
        answer = await self._ask(self._connected().Cancel, request)
        return int(answer.cancelled)

    def _connected(self) -> router_pb2_grpc.RouterStub:
        if self._stub is None:
            raise UnavailableError("The router is not there yet", retry_after=2.0)
        return self._stub

    async def _ask(self, method: Callable[..., Awaitable[Any]], request: Any) -> Any:
        """A unary call. Raises RouterError."""
        try:
            return await method(request, timeout=_UNARY_TIMEOUT, metadata=self._metadata)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None

    # --------------------------------------------------------------- sending

    def _post(self, message: router_pb2.ClientMessage) -> None:
        if self._writer is not None:
            self._writer.write(frame(message))

    def _send_call(self, call: Call) -> None:
        call.attempt += 1
        call.sent = True
        call.waiting_since = None
        submit = router_pb2.Submit(key=call.key, attempt=call.attempt, request=call.request)
        if call.attempt > 1 and call.accepted.done():
            submit.delivered.CopyFrom(_delivered(call))
        self._post(router_pb2.ClientMessage(submit=submit))
        if call.paused:
            self._post(router_pb2.ClientMessage(pause=call.key))

    # ------------------------------------------------------------ connection

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Ends the stream and its task."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))

    async def _run(self) -> None:
        backoff = _FIRST_BACKOFF
        while True:
            try:
                await self._follow()
            except asyncio.CancelledError:
                self._disconnected()  # this gateway is stopping: nobody was lost
                raise
            except OSError as error:
                logger.debug("no router", extra={"fields": {"cause": str(error)}})
            except Exception:
                logger.exception("the stream to the router failed")
            connected = self._writer is not None
            self._disconnected()
            if connected:
                logger.warning(
                    "the router is gone", extra={"fields": {"requests_held": len(self._calls)}}
                )
            backoff = _FIRST_BACKOFF if connected else min(backoff * 2, _LAST_BACKOFF)
            await asyncio.sleep(backoff)

    async def _follow(self) -> None:
        """One stream, from its beginning to its end. Raises OSError."""
        reader, writer = await asyncio.open_unix_connection(stream_path(self._address))
        channel = grpc.aio.insecure_channel(self._address, options=_CHANNEL_OPTIONS)
        try:
            writer.write(frame(router_pb2.ClientMessage(hello=self._hello)))
            while (message := await read_message(reader, router_pb2.ServerMessage())) is not None:
                if self._writer is None:
                    self._stub, self._writer = router_pb2_grpc.RouterStub(channel), writer
                self._receive(message)
        finally:
            writer.close()
            await channel.close()

    def _disconnected(self) -> None:
        self._stub = self._writer = None
        self.state.update(None)
        now = time.monotonic()
        for call in self._calls.values():
            call.sent = False
            if call.waiting_since is None:
                call.waiting_since = now

    def expire(self, now: float) -> None:
        """Fails the calls that have waited too long for a router. Called by a slow timer."""
        late = [
            call
            for call in self._calls.values()
            if call.waiting_since is not None and now - call.waiting_since > self._timeout
        ]
        if late:
            logger.warning("no router came", extra={"fields": {"requests_failed": len(late)}})
        for call in late:
            del self._calls[call.key]
            self._fail(
                call,
                UnavailableError(
                    f"No router took the request within {self._timeout:g} s", retry_after=5.0
                ),
            )

    # ------------------------------------------------------------- receiving

    def _receive(self, message: router_pb2.ServerMessage) -> None:
        touched: dict[Sink, None] = {}
        calls = self._calls
        for row in decode_columns(message.tokens):
            key, attempt, index, position, offset, id_, logprob, text = row
            call = calls.get(key)
            if call is None or attempt != call.attempt:
                continue
            try:
                # NaN, which no number equals, where there is none.
                token = Token(id_, text, logprob if logprob == logprob else None)
                new, text = call.answers[index].take(position, (token,), text, offset)
                if new:
                    call.sink.tokens(index, new, text)
            except Exception:
                self._undeliverable(call)
            touched[call.sink] = None
        for keyed in message.events:
            call = calls.get(keyed.key)
            if call is None or keyed.attempt != call.attempt:
                continue
            try:
                self._deliver(call, keyed.event)
            except Exception:
                self._undeliverable(call)
            touched[call.sink] = None
        for sink in touched:
            try:
                sink.flush()
            except Exception:
                logger.exception("events could not be written")
        if message.HasField("status"):
            self._on_status(message.status)

    def _deliver(self, call: Call, event: router_pb2.GenerateEvent) -> None:
        kind = event.WhichOneof("event")
        if kind == "tokens":
            came = event.tokens
            answer = call.answers[came.index]
            new = [token_of(token) for token in came.tokens]
            tokens, text = answer.take(came.first_index, new, came.text, came.text_offset)
            if tokens or text:
                call.sink.tokens(came.index, tokens, text)
        elif kind == "accepted":
            if not call.accepted.done():  # a resubmission is accepted again
                if event.accepted.HasField("seed"):
                    call.seed = event.accepted.seed
                call.unfinished = event.accepted.num_answers
                call.answers = [CallAnswer() for _ in range(call.unfinished)]
                call.accepted.set_result(event.accepted)
        elif kind == "finished":
            answer = call.answers[event.finished.index]
            if answer.finished:  # a new router sends what is ranked as a whole
                return
            answer.finished = True
            call.unfinished -= 1
            if not call.unfinished:
                del self._calls[call.key]
                call.ended = True
            call.sink.finished(event.finished)
        elif kind == "error":
            del self._calls[call.key]
            self._fail(call, from_proto(event.error))

    def _undeliverable(self, call: Call) -> None:
        logger.exception("an event could not be delivered")
        self.cancel(call)
        self._fail(call, InternalError())

    @staticmethod
    def _fail(call: Call, error: RouterError) -> None:
        try:
            call.fail(error)
        except Exception:
            logger.exception("an error could not be delivered")

    def _on_status(self, status: router_pb2.ServerStatus) -> None:
        self.state.update(status)
        if self.state.router_takes_requests:
            for call in self._calls.values():
                if not call.sent:
                    self._send_call(call)
        if self.state.current()[0] is State.FAILED:
            calls, self._calls = self._calls, {}
            for call in calls.values():
                self._fail(call, UnavailableError(status.detail or "The server has failed"))


def _delivered(call: Call) -> router_pb2.Delivered:
    return router_pb2.Delivered(
        seed=call.seed,
        answers=[
            router_pb2.DeliveredAnswer(
                index=index,
                tokens=[router_pb2.Token(id=token.id) for token in answer.tokens],
                text_offset=answer.text_offset,
                finished=answer.finished,
            )
            for index, answer in enumerate(call.answers)
            if answer.tokens or answer.finished
        ],
    )
