"""Many HTTP streams for as little CPU as Python can: it shares the cores with what it measures.

One thread, plain sockets, one poll for all. It counts events and checks that each answer is whole;
it parses no JSON. It looks every few milliseconds rather than being woken by each packet: waking a
process of the same machine is a cost that the server would have for it, and has for no client
elsewhere.
"""

from __future__ import annotations

import json
import select
import socket
import time
from collections.abc import Mapping
from typing import Any

_END = b"0\r\n\r\n"  # of a chunked body
_TOKEN = b"data: {"
_RECEIVE = 1 << 16
_PAUSE = 0.005  # seconds between looks at the sockets


class StreamFailed(RuntimeError):
    """A server's answer that was not the one asked for."""


class _Connection:
    """One stream: an answer after the other over one connection."""

    __slots__ = ("answered", "request", "socket", "tail", "tokens")

    def __init__(self, address: tuple[str, int], request: bytes) -> None:
        self.socket = socket.create_connection(address)
        self.socket.setblocking(False)
        self.request = request
        self.tail = b""
        self.tokens = 0  # of the answer under way
        self.answered = False  # its status has been seen

    def ask(self) -> None:
        self.tail, self.tokens, self.answered = b"", 0, False
        self.socket.sendall(self.request)

    def read(self) -> tuple[int, bool]:
        """(tokens that came, whether the answer is complete). Raises StreamFailed."""
        data = self.socket.recv(_RECEIVE)
        if not data:
            raise StreamFailed(f"the server closed a stream: {self.tail!r}")
        if not self.answered:
            if not data.startswith(b"HTTP/1.1 200"):
                raise StreamFailed(data.decode(errors="replace"))
            self.answered = True
        seen = self.tail + data
        count = seen.count(_TOKEN)
        self.tail = seen[-len(_TOKEN) + 1 :]
        self.tokens += count
        return count, seen.endswith(_END)


class Streams:
    """`number` clients that ask again as soon as they are answered."""

    def __init__(self, url: str, number: int, body: Mapping[str, Any], tokens: int) -> None:
        """`body`: of POST /v1/completions, streaming; `tokens`: events that each answer has."""
        host, _, port = url.removeprefix("http://").partition(":")
        payload = json.dumps(body).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
        )
        self._tokens = tokens
        self._poll = select.epoll()
        self._connections: dict[int, _Connection] = {}
        for _ in range(number):
            connection = _Connection((host, int(port)), head.encode() + payload)
            self._connections[connection.socket.fileno()] = connection
            self._poll.register(connection.socket, select.EPOLLIN)
            connection.ask()

    def run(self, seconds: float) -> tuple[int, int]:
        """(tokens, answers) that came within `seconds`. Raises StreamFailed."""
        tokens = answers = 0
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(_PAUSE)
            for number, _ in self._poll.poll(0):
                connection = self._connections[number]
                count, complete = connection.read()
                tokens += count
                if complete:
                    if connection.tokens != self._tokens:
                        raise StreamFailed(f"an answer had {connection.tokens} events")
                    answers += 1
                    connection.ask()
        return tokens, answers

    def close(self) -> None:
        for connection in self._connections.values():
            connection.socket.close()
        self._poll.close()
