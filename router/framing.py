"""Messages over a stream socket: each is its length, four bytes little-endian, and itself.

What gateways say to the router of their own machine, and hear, goes this way: gRPC would hand every
message through threads of its own, which costs more than what a step's tokens cost otherwise.
"""

from __future__ import annotations

import asyncio
from typing import Protocol, TypeVar

MAX_MESSAGE_BYTES = 256 << 20
_HEAD_BYTES = 4


class Message(Protocol):
    """A protobuf message."""

    def SerializeToString(self) -> bytes: ...

    def ParseFromString(self, data: bytes) -> object: ...


M = TypeVar("M", bound=Message)


def stream_path(address: str) -> str:
    """Where the router whose gRPC address is "unix:PATH" listens for gateways' streams.

    Raises ValueError for another address.
    """
    path = address.removeprefix("unix:")
    if path == address:
        raise ValueError(f"not the address of a unix socket: {address}")
    return path + ".stream"


def frame(message: Message) -> bytes:
    data = message.SerializeToString()
    return len(data).to_bytes(_HEAD_BYTES, "little") + data


async def read_message(reader: asyncio.StreamReader, message: M) -> M | None:
    """Fills `message` with the next one; None: the other side is gone.

    Raises ValueError where it says what is no message.
    """
    try:
        size = int.from_bytes(await reader.readexactly(_HEAD_BYTES), "little")
        if size > MAX_MESSAGE_BYTES:
            raise ValueError(f"a message of {size} bytes, more than {MAX_MESSAGE_BYTES}")
        data = await reader.readexactly(size)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    try:
        message.ParseFromString(data)
    except Exception as error:  # protobuf's own
        raise ValueError(f"not a message: {error}") from error
    return message
