"""One rank's stream: plans to the shard, results back.

Over a socket where the shard is on this machine (framing.py), elsewhere by gRPC.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol, cast

import grpc

from headgate.proto import shard_pb2
from headgate.proto.framing import Frames, frame

logger = logging.getLogger(__name__)

OnResult = Callable[[shard_pb2.StepResult], None]
OnEnd = Callable[[str], None]  # with the cause


class StreamEnded(Exception):
    """Nothing can be sent any more; it says why."""


class StepStream(Protocol):
    """Open when made. Its end is told once, unless `close` was what ended it."""

    async def send(self, message: shard_pb2.StepPlans) -> None:
        """Waits for room. Raises StreamEnded."""

    def close(self) -> None: ...


class SocketSteps(asyncio.Protocol):
    """Messages as framing.py has them, handled where they arrive: no task is woken for one."""

    def __init__(self, on_result: OnResult, on_end: OnEnd) -> None:
        self._on_result = on_result
        self._on_end = on_end
        self._frames = Frames()
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._cause = ""  # of its end
        self._transport: asyncio.Transport | None = None

    @classmethod
    async def open(cls, path: str, on_result: OnResult, on_end: OnEnd) -> SocketSteps:
        """Raises OSError."""
        loop = asyncio.get_running_loop()
        _, stream = await loop.create_unix_connection(lambda: cls(on_result, on_end), path)
        return stream

    async def send(self, message: shard_pb2.StepPlans) -> None:
        await self._has_room.wait()
        if self._transport is None:
            raise StreamEnded(self._cause)
        self._transport.write(frame(message))

    def close(self) -> None:
        self._on_end = _nobody_asks
        if self._transport is not None:
            self._transport.abort()

    # What follows is called by the event loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            for each in self._frames.feed(data):
                self._on_result(shard_pb2.StepResult.FromString(each))
        except Exception as error:
            logger.exception("a step's result could not be taken")
            self._end(f"its result cannot be read: {error}")

    def pause_writing(self) -> None:
        self._has_room.clear()

    def resume_writing(self) -> None:
        self._has_room.set()

    def connection_lost(self, error: Exception | None) -> None:
        self._end(f"its stream broke: {error}" if error else "it ended its stream")

    def _end(self, cause: str) -> None:
        """The first cause counts."""
        transport, self._transport = self._transport, None
        if transport is None:
            return
        transport.abort()
        self._cause = cause
        self._has_room.set()  # whoever waits shall hear of it
        self._on_end(cause)


class GrpcSteps:
    """The RPC Steps."""

    def __init__(self, call: grpc.aio.StreamStreamCall, on_result: OnResult, on_end: OnEnd) -> None:
        self._call = call
        self._on_result = on_result
        self._on_end = on_end
        self._reader = asyncio.get_running_loop().create_task(self._read())

    async def send(self, message: shard_pb2.StepPlans) -> None:
        try:
            await self._call.write(message)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            raise StreamEnded(f"its stream broke: {describe(error)}") from error

    def close(self) -> None:
        self._reader.cancel()
        self._call.cancel()

    async def _read(self) -> None:
        try:
            async for result in self._call:
                self._on_result(result)
            cause = "it ended its stream"
        except grpc.aio.AioRpcError as error:
            cause = f"its stream broke: {describe(error)}"
        except asyncio.CancelledError:
            raise
        except Exception as error:
            logger.exception("a step's result could not be taken")
            cause = f"its result cannot be read: {error}"
        self._on_end(cause)


def describe(error: BaseException) -> str:
    """What went wrong in a call, for a sentence."""
    if isinstance(error, grpc.aio.AioRpcError):
        return error.details() or error.code().name
    return str(error) or type(error).__name__


def _nobody_asks(cause: str) -> None:
    """Of a stream that was closed."""
