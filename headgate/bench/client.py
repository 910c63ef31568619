"""A closed loop of HTTP clients: each sends its next request when its last one is answered.

While the clock runs, blocks of bytes are only stamped and kept; they are taken apart afterwards, so
that the client takes little from the cores of the server beside it.
"""

from __future__ import annotations

import asyncio
import json
import resource
import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

from headgate.bench.workload import BenchRequest

_BLOCK = 1 << 16
_END_OF_HEAD = b"\r\n\r\n"
_REQUEST_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Reply:
    """What came of one request. Times on time.perf_counter's clock."""

    sent: float
    ended: float
    token_times: tuple[float, ...] = ()  # of the events that carried a token
    prompt_tokens: int = 0  # as the server counts
    output_tokens: int = 0
    error: str = ""


@dataclass(frozen=True, slots=True)
class RunResult:
    """One run of a workload. Times in milliseconds, but where the name says seconds."""

    output_tokens_per_s: float
    requests_per_s: float
    seconds: float
    ttft_p50: float  # from sending to the first token
    ttft_p90: float
    itl_p50: float  # between two tokens of a request
    itl_p90: float
    prompt_tokens: int
    output_tokens: int
    errors: int
    first_error: str
    client_cpu_seconds: float


def run(
    url: str, model: str, requests: Sequence[BenchRequest], concurrency: int, exact: bool = True
) -> RunResult:
    """Sends all requests to `url`/v1/completions.

    `exact`: the server knows `ignore_eos` and `min_tokens`; else it must be made to go on by other
    means.
    """
    cpu = _cpu_seconds()
    started = time.perf_counter()
    replies = asyncio.run(_drive(url, model, requests, concurrency, exact))
    seconds = time.perf_counter() - started
    cpu = _cpu_seconds() - cpu
    good = [reply for reply in replies if not reply.error]
    bad = [reply.error for reply in replies if reply.error]
    output = sum(reply.output_tokens for reply in good)
    first = [reply.token_times[0] - reply.sent for reply in good]
    gaps = [after - before for reply in good for before, after in pairwise(reply.token_times)]
    return RunResult(
        output_tokens_per_s=output / seconds,
        requests_per_s=len(good) / seconds,
        seconds=seconds,
        ttft_p50=percentile(first, 0.5) * 1e3,
        ttft_p90=percentile(first, 0.9) * 1e3,
        itl_p50=percentile(gaps, 0.5) * 1e3,
        itl_p90=percentile(gaps, 0.9) * 1e3,
        prompt_tokens=sum(reply.prompt_tokens for reply in good),
        output_tokens=output,
        errors=len(bad),
        first_error=bad[0] if bad else "",
        client_cpu_seconds=cpu,
    )


def percentile(values: Sequence[float], share: float) -> float:
    """Between the two values nearest to it, in proportion; 0 without values."""
    if not values:
        return 0.0
    ordered = sorted(values)
    place = (len(ordered) - 1) * share
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


async def _drive(
    url: str, model: str, requests: Sequence[BenchRequest], concurrency: int, exact: bool
) -> list[Reply]:
    waiting = iter(requests)
    replies: list[Reply] = []

    async def client() -> None:
        for request in waiting:
            body = _body(model, request, exact)
            replies.append(await _ask(url, json.dumps(body).encode(), request))

    await asyncio.gather(*(client() for _ in range(min(concurrency, len(requests)))))
    return replies


def _body(model: str, request: BenchRequest, exact: bool) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": model,
        "prompt": request.prompt,
        "max_tokens": request.output_tokens,
        "temperature": 0,
        "stream": True,
    }
    if exact:
        body |= {
            "min_tokens": request.output_tokens,
            "ignore_eos": True,
            "stream_options": {"include_usage": True},
        }
    return body


async def _ask(url: str, body: bytes, request: BenchRequest) -> Reply:
    target = urlsplit(url)
    head = (
        f"POST {target.path}/v1/completions HTTP/1.1\r\nHost: {target.netloc}\r\n"
        "Content-Type: application/json\r\nAccept: text/event-stream\r\nConnection: close\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    blocks: list[tuple[float, bytes]] = []

    async def exchange() -> None:
        reader, writer = await asyncio.open_connection(target.hostname, target.port)
        try:
            writer.write(head.encode() + body)
            while block := await reader.read(_BLOCK):
                blocks.append((time.perf_counter(), block))
        finally:
            writer.close()

    sent = time.perf_counter()
    try:
        await asyncio.wait_for(exchange(), _REQUEST_SECONDS)
    except (OSError, asyncio.TimeoutError) as error:
        return Reply(sent, time.perf_counter(), error=f"{type(error).__name__}: {error}")
    return _taken_apart(sent, time.perf_counter(), blocks, request)


# ------------------------------------------------------------------ afterwards


def _taken_apart(
    sent: float, ended: float, blocks: Sequence[tuple[float, bytes]], request: BenchRequest
) -> Reply:
    """The reply, from the bytes as they came."""
    raw = b"".join(block for _, block in blocks)
    head, _, rest = raw.partition(_END_OF_HEAD)
    status = head.split(b" ", 2)[1:2]
    if status != [b"200"]:
        return Reply(sent, ended, error=f"HTTP {raw[:300]!r}")
    chunked = b"transfer-encoding: chunked" in head.lower()
    start = len(raw) - len(rest)
    pieces = list(_chunks(raw, start)) if chunked else [(start, rest)]
    arrivals = _Arrivals(blocks)
    times, prompt, output = [], 0, 0
    for offset, event in _events(pieces):
        if error := event.get("error"):
            return Reply(sent, ended, error=str(error))
        if _has_token(event):
            times.append(arrivals.of(offset))
        usage = event.get("usage") or {}
        prompt = usage.get("prompt_tokens", prompt)
        output = usage.get("completion_tokens", output)
    if not times:
        return Reply(sent, ended, error=f"no token came: {raw[:300]!r}")
    return Reply(sent, ended, tuple(times), prompt or request.prompt_tokens, output or len(times))


class _Arrivals:
    """When the byte at an offset came."""

    def __init__(self, blocks: Sequence[tuple[float, bytes]]) -> None:
        self._times = [time for time, _ in blocks]
        self._ends: list[int] = []
        for _, block in blocks:
            self._ends.append((self._ends[-1] if self._ends else 0) + len(block))

    def of(self, offset: int) -> float:
        return self._times[bisect_left(self._ends, offset + 1)]


def _chunks(raw: bytes, start: int) -> Iterator[tuple[int, bytes]]:
    """(offset in `raw`, bytes) of each chunk of a body that begins at `start`."""
    while start < len(raw):
        end = raw.index(b"\r\n", start)
        size = int(raw[start:end].split(b";")[0], 16)
        if size == 0:
            return
        yield end + 2, raw[end + 2 : end + 2 + size]
        start = end + 2 + size + 2


def _events(pieces: Sequence[tuple[int, bytes]]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(offset of its last byte in the raw reply, JSON) of each event, wherever chunks end."""
    held = b""
    for offset, piece in pieces:
        *lines, rest = (held + piece).split(b"\n")
        position = offset - len(held)
        for line in lines:
            position += len(line) + 1
            data = line.removeprefix(b"data:").strip()
            if data != line.strip() and data.startswith(b"{"):
                yield position - 1, json.loads(data)
        held = rest


def _has_token(event: Mapping[str, Any]) -> bool:
    """An event without text that is not the end is a token whose characters are incomplete."""
    choices = event.get("choices") or ()
    return any(choice.get("text") or not choice.get("finish_reason") for choice in choices)


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
