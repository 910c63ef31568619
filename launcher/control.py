"""The control socket: JSON lines between the launcher (listening) and its router.

It carries events and drops what nobody hears: a router that comes back is told how things stand
by whoever handles `on_connect`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Event = dict[str, Any]


class ControlServer:
    """One router at a time; a new connection takes the place of the former."""

    def __init__(
        self, path: Path, on_event: Callable[[Event], None], on_connect: Callable[[], None]
    ) -> None:
        self._path = path
        self._on_event = on_event
        self._on_connect = on_connect
        self._server: asyncio.Server | None = None
        self._router: asyncio.StreamWriter | None = None

    async def start(self) -> None:
        """Listens from now on."""
        self._server = await asyncio.start_unix_server(self._serve, str(self._path))

    def send(self, event: str, **fields: Any) -> bool:
        """Tells the router; False if none is connected."""
        if self._router is None or self._router.is_closing():
            return False
        self._router.write(json.dumps({"event": event, **fields}).encode() + b"\n")
        return True

    def close(self) -> None:
        """Closes the socket and the connection."""
        if self._server is not None:
            self._server.close()
        if self._router is not None:
            self._router.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._router is not None:
            self._router.close()
        self._router = writer
        self._on_connect()
        try:
            while line := await reader.readline():
                event = _parse(line)
                if event is not None:
                    self._on_event(event)
        except (ConnectionError, ValueError):
            pass  # broken off, or a line without end: as if it had hung up
        finally:
            if self._router is writer:
                self._router = None
            writer.close()


def _parse(line: bytes) -> Event | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None
