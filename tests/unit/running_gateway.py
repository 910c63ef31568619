"""A gateway with a fake router behind it, served over real HTTP within the test's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from headgate.router.gateway.app import Gateway
from headgate.router.gateway.config import GatewayConfig
from headgate.router.gateway.http_protocol import HttpProtocol
from headgate.router.gateway.server_state import State
from tests.unit.fake_router import FakeRouter, Script


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class RunningGateway:
    """`async with RunningGateway() as running:` and then HTTP through `running.http`."""

    def __init__(self, script: Script | None = None, *, router: bool = True, **config: Any) -> None:
        self.directory = tempfile.TemporaryDirectory(prefix="hg-")
        folder = Path(self.directory.name)
        self.status_path = folder / "status.json"
        self.router = FakeRouter(f"unix:{folder}/router.sock", script)
        self.config = GatewayConfig(
            router_address=self.router.address, status_path=str(self.status_path), **config
        )
        self._with_router = router

    async def __aenter__(self) -> RunningGateway:
        if self._with_router:
            await self.router.__aenter__()
        self.gateway = Gateway(self.config)
        listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = listener.getsockname()[1]
        self._server = _Server(
            uvicorn.Config(
                self.gateway, http=HttpProtocol, ws="none", log_config=None, access_log=False,
                timeout_graceful_shutdown=1,
            )
        )  # fmt: skip
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]))
        self.http = httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.port}", timeout=20)
        await until(lambda: self._server.started)
        if self._with_router:
            await self.until_state(State.READY)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.http.aclose()
        self._server.should_exit = True
        await self._serving
        await self.router.die()
        self.directory.cleanup()

    async def until_state(self, state: State) -> None:
        await until(lambda: self.gateway.services.state.current()[0] is state)

    def restart_router(self, script: Script | None = None) -> FakeRouter:
        """A new router on the same address; start it with `async with` or `__aenter__`."""
        self.router = FakeRouter(self.router.address, script)
        return self.router

    async def stream(self, path: str, body: dict[str, Any]) -> list[Any]:
        """The events of a stream: parsed JSON, or "[DONE]"."""
        async with self.http.stream("POST", path, json=body) as response:
            text = (await response.aread()).decode()
            assert response.status_code == 200, text
            assert response.headers["content-type"] == "text/event-stream"
            return events_of(text)

    async def raw(self, path: str, body: dict[str, Any]) -> Connection:
        """A connection that has sent a request and read nothing."""
        data = json.dumps(body).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=4096)
        writer.write(
            b"POST %s HTTP/1.1\r\nhost: test\r\ncontent-length: %d\r\n\r\n"
            % (path.encode(), len(data))
            + data
        )
        return reader, writer


Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def events_of(text: str) -> list[Any]:
    frames = text.split("\n\n")
    assert frames.pop() == "", "the last event must be closed"
    events: list[Any] = []
    for frame in frames:
        if frame == ":":
            continue
        assert frame.startswith("data: "), frame
        assert "\n" not in frame
        data = frame.removeprefix("data: ")
        events.append(data if data == "[DONE]" else json.loads(data))
    return events


async def until(condition: Callable[[], object], timeout: float = 5.0) -> None:
    """Waits for a condition; fails the test after `timeout` seconds."""
    end = asyncio.get_running_loop().time() + timeout
    while not condition():
        assert asyncio.get_running_loop().time() < end, "the condition did not come true"
        await asyncio.sleep(0.005)
