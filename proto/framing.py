"""Messages over a stream socket: each is its length, four bytes little-endian, and itself.

What a router says to the gateways and shards of its own machine, and hears from them, goes this
way: gRPC would hand every message through threads of its own, which costs more than what a step's
tokens cost otherwise.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import BinaryIO, Protocol, TypeVar

MAX_MESSAGE_BYTES = 256 << 20
_HEAD_BYTES = 4


class Message(Protocol):
    """A protobuf message."""

    def SerializeToString(self) -> bytes: ...

    def ParseFromString(self, data: bytes) -> object: ...


M = TypeVar("M", bound=Message)


def stream_path(address: str) -> str:
    """Where the process whose gRPC address is "unix:PATH" listens for streams of such messages.

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
        data = await reader.readexactly(_size(await reader.readexactly(_HEAD_BYTES)))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    return _parse(data, message)


def wait_for_message(file: BinaryIO, message: M) -> M | None:
    """As read_message, from a socket's buffered file, for a thread of its own."""
    try:
        head = file.read(_HEAD_BYTES)
        if len(head) < _HEAD_BYTES:
            return None
        size = _size(head)
        data = file.read(size)
    except OSError:
        return None
    return _parse(data, message) if len(data) == size else None


class Frames:
    """Cuts what arrives, in pieces of any size, into messages."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The messages that are complete with `data`. Raises ValueError for one too large."""
        self._data += data
        at = 0
        while len(self._data) - at >= _HEAD_BYTES:
            end = at + _HEAD_BYTES + _size(self._data[at : at + _HEAD_BYTES])
            if end > len(self._data):
                break
            yield bytes(self._data[at + _HEAD_BYTES : end])
            at = end
        del self._data[:at]


def _size(head: bytes | bytearray) -> int:
    size = int.from_bytes(head, "little")
    if size > MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {size} bytes, more than {MAX_MESSAGE_BYTES}")
    return size


def _parse(data: bytes, message: M) -> M:
    try:
        message.ParseFromString(data)
    except Exception as error:  # protobuf's own
        raise ValueError(f"not a message: {error}") from error
    return message
