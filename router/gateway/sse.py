"""Event streams: bytes for one client, gathered and sent without a task per token.

An `EventWriter` buffers until its response has begun, sends everything gathered in one body
message, keeps at most one send in flight and says when its client reads too slowly.
`Housekeeper` is the one slow timer of the process. Knows nothing of what the events mean.
"""

from __future__ import annotations

import asyncio
import time
import types
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Protocol

import orjson
from starlette.types import Send

from headgate.router.errors import RouterError, SlowClientError

DONE = b"data: [DONE]\n\n"
COMMENT = b":\n\n"  # keeps idle connections open, ignored by every client
EVENT_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


def json_string(text: str) -> bytes:
    """`text` as a JSON string, quotes included."""
    return orjson.dumps(text)


def json_number(value: float) -> bytes:
    """A float32 to its 7 significant digits; what JSON cannot say (infinity) is null."""
    if value - value != 0.0:
        return b"null"
    digits = b"%.7g" % value
    return digits if b"." in digits or b"e" in digits else digits + b".0"


def event(body: bytes) -> bytes:
    return b"data: " + body + b"\n\n"


class Producer(Protocol):
    """What fills a writer, as the writer sees it."""

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def abort(self, error: RouterError) -> None:
        """Stop producing and write the error as the last event."""


class EventWriter:
    """The response body of one event stream. Used from the event loop's thread only."""

    def __init__(
        self,
        send: Send,
        producer: Producer,
        limit: int,
        keep_alive: bytes = COMMENT,
        write_chunk: Callable[[bytes], bool] | None = None,
    ) -> None:
        """`limit`: bytes held before the producer is paused; `keep_alive`: means nothing;
        `write_chunk`: does what `send` would, at once, or refuses."""
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.last_write = time.monotonic()
        self.stalled_since: float | None = None  # when a send began to wait for the client
        self._send = send
        self._write_chunk = write_chunk
        self._producer = producer
        self._limit = limit
        self.keep_alive = keep_alive
        self._buffer: list[bytes] = []
        self._size = 0
        self._opened = False
        self._closing = False
        self._ended = False  # the last body message has been handed over
        self._paused = False

    def write(self, data: bytes) -> None:
        """Takes whole events. They go out at the next flush."""
        if data and not self._closing:
            self._buffer.append(data)
            self._size += len(data)

    def close(self) -> None:
        """Nothing follows what has been written."""
        self._closing = True

    def discard(self) -> None:
        """Drops what has not been sent."""
        self._buffer.clear()
        self._size = 0

    def open(self) -> None:
        """The response has begun: bytes may go out."""
        self._opened = True
        self.flush()

    def flush(self) -> None:
        """Sends what has been gathered, unless a send is still under way (then after it)."""
        if not self._opened or self._ended or self.done.done():
            return
        if self.stalled_since is not None:
            if self._size > self._limit and not self._paused:
                self._paused = True
                self._producer.pause()
            return
        if not self._buffer and not self._closing:
            return
        buffer = self._buffer
        data = buffer[0] if len(buffer) == 1 else b"".join(buffer)
        buffer.clear()
        self._size = 0
        self._ended = self._closing
        self.last_write = time.monotonic()
        if self._ended or self._write_chunk is None or not self._write_chunk(data):
            self._start_send(data)

    def _start_send(self, data: bytes) -> None:
        """Runs `send` here and now; only if it has to wait does a task carry it on."""
        sending: Coroutine[Any, Any, None] = self._send(  # type: ignore[assignment]
            {"type": "http.response.body", "body": data, "more_body": not self._ended}
        )
        try:
            waiting = sending.send(None)
        except StopIteration:
            self._sent()
        except Exception as error:
            self._fail(error)
        else:
            self.stalled_since = self.last_write
            task = asyncio.get_running_loop().create_task(_carry_on(sending, waiting))
            task.add_done_callback(self._late_sent)

    def _late_sent(self, task: asyncio.Task[None]) -> None:
        self.stalled_since = None
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._fail(error)
            return
        self._sent()
        self.flush()
        if self._paused and self.stalled_since is None:
            self._paused = False
            self._producer.resume()

    def _sent(self) -> None:
        if self._ended and not self.done.done():
            self.done.set_result(None)

    def _fail(self, error: BaseException) -> None:
        if not self.done.done():
            self.done.set_exception(error)
            self.done.exception()  # marks it as seen: the route may be gone

    def abort(self, error: RouterError) -> None:
        """Ends the stream with an error event in place of what was not sent."""
        self.discard()
        self._producer.abort(error)


async def _carry_on(sending: Coroutine[Any, Any, None], waiting: Any) -> None:
    await _rest(sending, waiting)


@types.coroutine
def _rest(sending: Coroutine[Any, Any, None], waiting: Any) -> Generator[Any, Any, None]:
    """The rest of a coroutine whose first step has been run by hand and gave `waiting`."""
    try:
        while True:
            try:
                answer = yield waiting
            except BaseException as error:
                waiting = sending.throw(error)
            else:
                waiting = sending.send(answer)
    except StopIteration:
        return


class Housekeeper:
    """Comment lines for idle streams, an end for stalled ones, and other slow checks."""

    def __init__(self, keep_alive: float, slow_client_timeout: float) -> None:
        self._keep_alive = keep_alive
        self._slow_client_timeout = slow_client_timeout
        self._period = min(1.0, keep_alive / 4, slow_client_timeout / 4)
        self._writers: set[EventWriter] = set()
        self._checks: list[Callable[[float], None]] = []
        self._task: asyncio.Task[None] | None = None

    def every_tick(self, check: Callable[[float], None]) -> None:
        """Has `check(now)` called about once a second."""
        self._checks.append(check)

    def add(self, writer: EventWriter) -> None:
        self._writers.add(writer)

    def remove(self, writer: EventWriter) -> None:
        self._writers.discard(writer)

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._period)
            now = time.monotonic()
            for writer in tuple(self._writers):
                self._look_after(writer, now)
            for check in self._checks:
                check(now)

    def _look_after(self, writer: EventWriter, now: float) -> None:
        if writer.stalled_since is not None:
            if now - writer.stalled_since > self._slow_client_timeout:
                self._writers.discard(writer)
                writer.abort(
                    SlowClientError(f"No byte was read for {self._slow_client_timeout:g} s")
                )
        elif now - writer.last_write >= self._keep_alive:
            writer.write(writer.keep_alive)
            writer.flush()
