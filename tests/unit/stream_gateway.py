"""A gateway's end of the stream to the router, for tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from headgate.proto import router_pb2
from headgate.proto.framing import frame, read_message, stream_path
from headgate.router import errors
from tests.unit.fake_shard_server import RunningRouter
from tests.unit.stream_events import all_events


class Gateway:
    """A gateway's end of Multiplex; remembers what it is told."""

    def __init__(self, router: RunningRouter, gateway_id: str = "gateway-0") -> None:
        self._router = router
        self._outbox: asyncio.Queue[router_pb2.ClientMessage | None] = asyncio.Queue()
        self.events: list[router_pb2.KeyedEvent] = []
        self.statuses: list[router_pb2.ServerStatus] = []
        self.batches: list[int] = []  # events per message
        self.in_columns = 0  # events that travelled as columns
        self.say(hello=router_pb2.Hello(gateway_id=gateway_id, api_key="secret"))
        self._task = asyncio.ensure_future(self._read())

    async def _outgoing(self) -> AsyncIterator[router_pb2.ClientMessage]:
        while (message := await self._outbox.get()) is not None:
            yield message

    def _incoming(self) -> AsyncIterator[router_pb2.ServerMessage]:
        return self._router.stub.Multiplex(self._outgoing())

    async def _read(self) -> None:
        async for message in self._incoming():
            events = list(all_events(message))
            self.in_columns += len(message.tokens.texts)
            self.events.extend(events)
            if events:
                self.batches.append(len(events))
            if message.HasField("status"):
                self.statuses.append(message.status)

    def say(self, **fields: Any) -> None:
        self._outbox.put_nowait(router_pb2.ClientMessage(**fields))

    def submit(
        self, key: int, message: router_pb2.GenerateRequest, attempt: int = 1, **fields: Any
    ) -> None:
        submit = router_pb2.Submit(key=key, attempt=attempt, request=message, **fields)
        self.say(submit=submit)

    def of(self, key: int, attempt: int = 1) -> list[router_pb2.GenerateEvent]:
        return [e.event for e in self.events if (e.key, e.attempt) == (key, attempt)]

    def tokens(self, key: int, attempt: int = 1) -> list[router_pb2.Token]:
        return [token for event in self.of(key, attempt) for token in event.tokens.tokens]

    def text(self, key: int, attempt: int = 1) -> str:
        return "".join(event.tokens.text for event in self.of(key, attempt))

    def ended(self, key: int, attempt: int = 1) -> bool:
        return any(e.WhichOneof("event") in ("finished", "error") for e in self.of(key, attempt))

    async def over(self) -> None:
        """Until the router ends the stream; raises what it says."""
        await self._task

    async def leave(self) -> None:
        self._task.cancel()
        await asyncio.wait((self._task,))


class LocalGateway(Gateway):
    """One that speaks over the router's socket instead."""

    async def _incoming(self) -> AsyncIterator[router_pb2.ServerMessage]:
        reader, writer = await asyncio.open_unix_connection(stream_path(self._router.unix))
        writing = asyncio.ensure_future(self._write(writer))
        try:
            while (message := await read_message(reader, router_pb2.ServerMessage())) is not None:
                yield message
        finally:
            writing.cancel()
            writer.close()

    async def _write(self, writer: asyncio.StreamWriter) -> None:
        async for message in self._outgoing():
            writer.write(frame(message))


of_both_kinds = pytest.mark.parametrize("kind", [Gateway, LocalGateway])


async def refused(call: Any) -> errors.RouterError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return errors.from_rpc_error(caught.value)


async def drained(stream: AsyncIterator[Any]) -> None:
    async for _ in stream:
        pass
