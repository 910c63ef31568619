"""The socket for gateways of this machine: Multiplex without gRPC, as framing.py has it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

from headgate.proto import router_pb2
from headgate.proto.framing import frame, read_message
from headgate.router.auth import is_authorized
from headgate.router.multiplex import Streams

logger = logging.getLogger(__name__)


class GatewaySocket:
    """The first message of a gateway is its Hello, with the API key where the router asks for one;
    a gateway that says anything else is sent away."""

    def __init__(self, streams: Streams, api_key: str) -> None:
        self._streams = streams
        self._api_key = api_key
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    async def start(self, path: str) -> None:
        """Raises OSError."""
        self._server = await asyncio.start_unix_server(self._serve, path)

    def stop(self) -> None:
        """Closes all connections."""
        if self._server is not None:
            self._server.close()
        for writer in self._writers:
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            await self._follow(reader, writer)
        except (OSError, ValueError) as error:
            logger.debug("a gateway's connection broke: %s", error)
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _follow(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first = await read_message(reader, router_pb2.ClientMessage())
        if first is None or first.WhichOneof("message") != "hello" or not self._knows(first.hello):
            logger.warning("a connection to the gateways' socket does not begin as it should")
            return
        stream = self._streams.open(first.hello.gateway_id)
        reading = asyncio.ensure_future(stream.follow(_messages(reader)))
        try:
            async with contextlib.aclosing(stream.messages()) as messages:
                async for message in messages:
                    writer.write(frame(message))
                    await writer.drain()
        finally:
            reading.cancel()
            self._streams.close(stream)

    def _knows(self, hello: router_pb2.Hello) -> bool:
        return not self._api_key or is_authorized(f"Bearer {hello.api_key}", self._api_key)


async def _messages(reader: asyncio.StreamReader) -> AsyncIterator[router_pb2.ClientMessage]:
    while (message := await read_message(reader, router_pb2.ClientMessage())) is not None:
        yield message
