"""The event writer: one send at a time, gathering, pausing; numbers and strings as JSON."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from headgate.router.errors import InternalError, RouterError
from headgate.router.gateway.sse import EventWriter, json_number, json_string


class Producer:
    def __init__(self) -> None:
        self.heard: list[str] = []
        self.writer: EventWriter | None = None

    def pause(self) -> None:
        self.heard.append("pause")

    def resume(self) -> None:
        self.heard.append("resume")

    def abort(self, error: RouterError) -> None:
        assert self.writer is not None
        self.writer.write(b"error")
        self.writer.close()


class Client:
    """`send` that waits while `ready` is unset, like a full socket."""

    def __init__(self) -> None:
        self.ready = asyncio.Event()
        self.ready.set()
        self.bodies: list[bytes] = []
        self.complete = False

    async def send(self, message: Any) -> None:
        await self.ready.wait()
        assert not self.complete
        self.bodies.append(message["body"])
        self.complete = not message["more_body"]


def make(limit: int = 10) -> tuple[Client, Producer, EventWriter]:
    client, producer = Client(), Producer()
    producer.writer = EventWriter(client.send, producer, limit)
    return client, producer, producer.writer


async def test_sends_at_once_what_was_gathered() -> None:
    client, _, writer = make()
    writer.write(b"a")
    writer.flush()
    assert client.bodies == []  # not open yet
    writer.write(b"b")
    writer.open()
    assert client.bodies == [b"ab"]  # before the event loop ran again
    writer.flush()
    assert client.bodies == [b"ab"]
    writer.write(b"c")
    writer.close()
    writer.write(b"too late")
    writer.flush()
    assert client.bodies == [b"ab", b"c"] and client.complete
    assert writer.done.done()


async def test_a_full_socket_pauses_and_loses_nothing() -> None:
    client, producer, writer = make(limit=10)
    writer.open()
    client.ready.clear()
    for _ in range(5):
        writer.write(b"12345")
        writer.flush()
    assert writer.stalled_since is not None
    assert producer.heard == ["pause"]
    client.ready.set()
    await asyncio.sleep(0.01)
    assert client.bodies == [b"12345", b"12345" * 4]
    assert producer.heard == ["pause", "resume"]
    assert writer.stalled_since is None
    writer.close()
    writer.flush()
    await writer.done


async def test_abort_replaces_what_was_not_sent() -> None:
    client, _, writer = make()
    writer.open()
    client.ready.clear()
    writer.write(b"first")
    writer.flush()
    writer.write(b"second")
    writer.abort(InternalError())
    client.ready.set()
    await writer.done
    assert client.bodies == [b"first", b"error"]


async def test_a_send_that_fails_ends_the_stream() -> None:
    async def broken(message: Any) -> None:
        raise OSError("gone")

    async def broken_later(message: Any) -> None:
        await asyncio.sleep(0)
        raise OSError("gone")

    for send in (broken, broken_later):
        writer = EventWriter(send, Producer(), 10)
        writer.open()
        writer.write(b"a")
        writer.flush()
        with pytest.raises(OSError, match="gone"):
            await writer.done
        writer.write(b"b")
        writer.flush()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (-0.5, b"-0.5"),
        (0.0, b"0.0"),
        (-3.0, b"-3.0"),
        (-0.30000001192092896, b"-0.3"),
        (-1e-9, b"-1e-09"),
        (float("-inf"), b"null"),
        (float("nan"), b"null"),
    ],
)
def test_numbers(value: float, text: bytes) -> None:
    assert json_number(value) == text
    json.loads(text)


def test_strings() -> None:
    text = 'é"\\\n\u2028\x00🙂'
    assert json.loads(json_string(text)) == text
    assert b"\n" not in json_string(text)
