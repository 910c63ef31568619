"""The socket between router and launcher: one JSON object a line, both ways. No meaning in here."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

logger = logging.getLogger(__name__)

MAX_LINE = 1 << 20
CONNECT_ATTEMPTS = 50
CONNECT_PAUSE = 0.1  # seconds

Event = dict[str, Any]


class ControlClient:
    """The router's end; the launcher listens."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def connect(cls, path: str) -> ControlClient:
        """Raises OSError if nobody listens for some seconds."""
        for attempt in range(CONNECT_ATTEMPTS):
            try:
                return cls(*await asyncio.open_unix_connection(path, limit=MAX_LINE))
            except OSError:
                if attempt == CONNECT_ATTEMPTS - 1:
                    raise
                await asyncio.sleep(CONNECT_PAUSE)
        raise AssertionError("unreachable")

    def send(self, event: str, **fields: Any) -> None:
        """Does not wait; a launcher that is gone is noticed by `events`."""
        if not self._writer.is_closing():
            self._writer.write(json.dumps({"event": event, **fields}).encode() + b"\n")

    async def events(self) -> AsyncIterator[Event]:
        """Ends when the launcher closes the connection. Lines that are no events are logged."""
        while line := await self._next_line():
            try:
                event = json.loads(line)
            except ValueError:
                event = None
            if isinstance(event, dict) and isinstance(event.get("event"), str):
                yield event
            else:
                logger.error("not an event: %r", line[:200])

    async def close(self) -> None:
        self._writer.close()

    async def _next_line(self) -> bytes:
        try:
            return await self._reader.readline()
        except (ConnectionError, ValueError):
            return b""
