"""`headgate batch`: a file of OpenAI batch requests in, a file of results in the same order out.

The gateway's own application answers each line, in this process and without HTTP, in front of a
server of the run's own. Started again after a kill it goes on where the output ends.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import uuid
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from headgate.batch_files import Bad, Done, Request, read_requests
from headgate.private_server import PrivateServer, ServerError
from headgate.progress import make_progress
from headgate.router.gateway.app import Gateway
from headgate.router.gateway.config import GatewayConfig

_AHEAD = 4  # requests read and answered beyond those in flight, while an early one takes long
_FULL, _UNAVAILABLE = 429, 503  # statuses that say nothing about the request itself
_PAUSE_SECONDS = 0.1
_STOPPED = 130


@dataclass(frozen=True, slots=True)
class BatchConfig:
    """What a run is to do, and the gateway's settings that the launcher's flags name."""

    input: Path
    output: Path
    flags: Sequence[str]
    max_concurrent_requests: int
    max_client_batch_size: int
    payload_limit: int
    strict: bool


def run(config: BatchConfig) -> int:
    """0: every line has its result, be it a refusal; 1: it cannot start or go on."""
    try:
        return asyncio.run(_run(config))
    except (OSError, ValueError, ServerError) as error:
        print(f"headgate batch: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("headgate batch: stopped; the same command goes on from here", file=sys.stderr)
        return _STOPPED


async def _run(config: BatchConfig) -> int:
    if config.output.exists() and config.input.samefile(config.output):
        raise ValueError("--input and --output are the same file.")
    done = Done.of(config.output)
    total = sum(1 for _ in read_requests(config.input, done))
    before = len(done.custom_ids) + len(done.lines)
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    failed = done.failed
    if total:
        with config.output.open("ab") as output, PrivateServer(config.flags) as server:
            await _until_ready(server)
            failed += await _Batch(config, server, output).run(done, total)
    kept = f"{before} of them before, " if before else ""
    print(f"{before + total} results ({kept}{failed} failed): {config.output}", file=sys.stderr)
    return 0


async def _until_ready(server: PrivateServer) -> None:
    """Waits in a thread, which ends with the server should this be cancelled."""
    try:
        await asyncio.to_thread(server.wait_ready)
    except asyncio.CancelledError:
        server.close()
        raise


class _Batch:
    def __init__(self, config: BatchConfig, server: PrivateServer, output: BinaryIO) -> None:
        self._config = config
        self._server = server
        self._output = output
        self._room = asyncio.Semaphore(config.max_concurrent_requests)
        self._live = 0  # requests at the gateway
        self._gateway = Gateway(
            GatewayConfig(
                router_address=server.address,
                status_path=server.status_path,
                payload_limit=config.payload_limit,
                max_client_batch_size=config.max_client_batch_size,
                strict=config.strict,
            )
        )

    async def run(self, done: Done, total: int) -> int:
        """The number of results that are not 200."""
        lines = read_requests(self._config.input, done)
        most = _AHEAD * self._config.max_concurrent_requests
        tasks: deque[asyncio.Task[dict[str, Any]]] = deque()
        failed = 0
        progress = make_progress(True, total, "Requests")
        self._gateway.start()
        try:
            self._fill(tasks, lines, most)
            while tasks:
                entry = await self._oldest(tasks)
                response = entry["response"]
                failed += not response or response["status_code"] != 200
                text = json.dumps(entry, ensure_ascii=False, separators=(",", ":"))
                self._output.write(text.encode("utf-8", "backslashreplace") + b"\n")
                self._output.flush()
                progress.update(1)
                self._fill(tasks, lines, most)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._gateway.stop()
            progress.close()
        return failed

    def _fill(
        self, tasks: deque[asyncio.Task[dict[str, Any]]], lines: Iterator[Request | Bad], most: int
    ) -> None:
        while len(tasks) < most:
            line = next(lines, None)
            if line is None:
                return
            tasks.append(asyncio.create_task(self._entry(line)))

    async def _oldest(self, tasks: deque[asyncio.Task[dict[str, Any]]]) -> dict[str, Any]:
        """The next result in the order of the input. Raises ServerError if the server ended."""
        while not tasks[0].done():
            self._server.check()
            await asyncio.wait((tasks[0],), timeout=1.0)
        return tasks.popleft().result()

    async def _entry(self, line: Request | Bad) -> dict[str, Any]:
        id_ = f"batch_req_{uuid.uuid4().hex}"
        if isinstance(line, Bad):
            error = {"code": line.code, "message": line.message, "line": line.line}
            return {"id": id_, "custom_id": line.custom_id, "response": None, "error": error}
        async with self._room:
            status, headers, body = await self._answer(line)
        response = {
            "status_code": status,
            "request_id": headers.get(b"x-request-id", b"").decode("latin-1"),
            "body": json.loads(body),
        }
        return {"id": id_, "custom_id": line.custom_id, "response": response, "error": None}

    async def _answer(self, line: Request) -> tuple[int, Mapping[bytes, bytes], bytes]:
        """As `_ask`, waiting for the server's shards and, with several prompts, for room."""
        while True:
            self._live += 1
            try:
                status, headers, body = await self._ask(line)
                alone = self._live == 1
            finally:
                self._live -= 1
            if status != _UNAVAILABLE and (status != _FULL or alone):
                return status, headers, body
            await asyncio.sleep(_PAUSE_SECONDS)

    async def _ask(self, line: Request) -> tuple[int, Mapping[bytes, bytes], bytes]:
        """The gateway's answer: status, headers, body."""
        body = json.dumps(line.body).encode()
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": line.url,
            "raw_path": line.url.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"content-type", b"application/json")],
            "client": None,
            "server": None,
        }
        unread = [{"type": "http.request", "body": body, "more_body": False}]
        status, headers, parts = 0, {}, []

        async def receive() -> dict[str, Any]:
            if unread:
                return unread.pop()
            await asyncio.Event().wait()  # this client stays until the end
            raise AssertionError

        async def send(message: Any) -> None:
            nonlocal status, headers
            if message["type"] == "http.response.start":
                status, headers = message["status"], dict(message["headers"])
            else:
                parts.append(message.get("body", b""))

        await self._gateway(scope, receive, send)
        return status, headers, b"".join(parts)
