"""The router's end of a shard's stream, against a socket that says what it is told to."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from headgate.proto import shard_pb2
from headgate.proto.framing import MAX_MESSAGE_BYTES, Frames, frame, read_message
from headgate.router.step_stream import SocketSteps, StreamEnded
from tests.unit.fake_shard_server import until


@dataclass
class Heard:
    """What a stream told its owner."""

    sequences: list[int] = field(default_factory=list)
    causes: list[str] = field(default_factory=list)

    def result(self, message: shard_pb2.StepResult) -> None:
        if message.refused:
            raise ValueError("a bug")
        self.sequences.append(message.sequence)


@dataclass
class Pair:
    """A stream and the shard's end of it."""

    steps: SocketSteps
    heard: Heard
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


@contextlib.asynccontextmanager
async def connected(directory: Path) -> AsyncIterator[Pair]:
    accepted: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Future()
    path = str(directory / "shard.stream")
    server = await asyncio.start_unix_server(lambda *ends: accepted.set_result(ends), path)
    heard = Heard()
    steps = await SocketSteps.open(path, heard.result, heard.causes.append)
    reader, writer = await accepted
    try:
        yield Pair(steps, heard, reader, writer)
    finally:
        steps.close()
        writer.close()
        server.close()


def result(sequence: int, refused: str = "") -> bytes:
    return frame(shard_pb2.StepResult(sequence=sequence, refused=refused))


def plans(size: int = 0) -> shard_pb2.StepPlans:
    return shard_pb2.StepPlans(plans=[shard_pb2.StepPlan(sequence=1, rows=bytes(size))])


async def test_results_come_in_pieces_of_any_size(tmp_path: Path) -> None:
    async with connected(tmp_path) as pair:
        data = b"".join(result(sequence) for sequence in range(1, 8))
        for at in range(0, len(data), 3):
            pair.writer.write(data[at : at + 3])
            await asyncio.sleep(0)
        await until(lambda: pair.heard.sequences == list(range(1, 8)))
        pair.writer.write(data)
        await until(lambda: pair.heard.sequences == list(range(1, 8)) * 2)
        assert not pair.heard.causes


async def test_a_plan_arrives(tmp_path: Path) -> None:
    async with connected(tmp_path) as pair:
        await pair.steps.send(plans(10))
        assert await read_message(pair.reader, shard_pb2.StepPlans()) == plans(10)


async def test_who_does_not_read_is_waited_for(tmp_path: Path) -> None:
    async with connected(tmp_path) as pair:
        await pair.steps.send(plans(4 << 20))
        waiting = asyncio.ensure_future(pair.steps.send(plans()))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        assert await read_message(pair.reader, shard_pb2.StepPlans()) == plans(4 << 20)
        await waiting
        assert await read_message(pair.reader, shard_pb2.StepPlans()) == plans()


async def test_the_shards_end_is_told_once(tmp_path: Path) -> None:
    async with connected(tmp_path) as pair:
        await pair.steps.send(plans(4 << 20))
        waiting = asyncio.ensure_future(pair.steps.send(plans()))
        await asyncio.sleep(0)
        pair.writer.transport.abort()
        await until(lambda: bool(pair.heard.causes))
        for sending in (waiting, pair.steps.send(plans())):
            with pytest.raises(StreamEnded, match=r"its stream broke|it ended its stream"):
                await sending
        assert len(pair.heard.causes) == 1


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"\x02\x00\x00\x00\xff\xff", "its result cannot be read"),
        (b"\xff\xff\xff\xff", f"more than {MAX_MESSAGE_BYTES}"),
        (result(1, refused="so that it raises"), "its result cannot be read: a bug"),
    ],
)
async def test_what_cannot_be_read_ends_the_stream(tmp_path: Path, data: bytes, cause: str) -> None:
    async with connected(tmp_path) as pair:
        pair.writer.write(data + result(2))
        await until(lambda: bool(pair.heard.causes))
        assert cause in pair.heard.causes[0]
        assert pair.heard.sequences == []
        assert await pair.reader.read() == b""


async def test_a_stream_that_is_closed_tells_nothing(tmp_path: Path) -> None:
    async with connected(tmp_path) as pair:
        pair.steps.close()
        assert await pair.reader.read() == b""
        await asyncio.sleep(0.01)
        assert not pair.heard.causes


def test_frames_of_nothing_and_of_many() -> None:
    frames = Frames()
    empty = frame(shard_pb2.StepResult())
    assert list(frames.feed(b"")) == []
    assert list(frames.feed(empty * 3 + empty[:2])) == [b""] * 3
    assert list(frames.feed(empty[2:])) == [b""]
