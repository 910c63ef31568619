"""HTTP/1.x on a connection: uvicorn's protocol, with what it lacks for strangers' clients.

- An offer to upgrade (Java's own client sends `upgrade: h2c` with each first request) is declined
  by going on in HTTP/1.1; uvicorn's parser would take the body for the other protocol's.
- To an HTTP/1.0 client a stream has no chunks: it ends with the connection.
- What is not HTTP is told so in the shape of all errors, and heads have a size limit.
"""

from __future__ import annotations

import re
import uuid
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from headgate.router.errors import MalformedError
from headgate.router.gateway.errors import tgi_error
from headgate.router.gateway.exchange import WRITE_CHUNK

MAX_HEAD_BYTES = 65_536  # request line and headers
_UPGRADE = re.compile(rb"\r\nupgrade[ \t]*:", re.IGNORECASE)
_END_OF_HEAD = b"\r\n\r\n"


class HttpProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._in_message = False
        self._head_complete = False
        self._head_bytes = 0  # received of a head that is not complete

    def data_received(self, data: bytes) -> None:
        if not (self._in_message and self._head_complete):
            head, end, rest = data.partition(_END_OF_HEAD)
            data = _UPGRADE.sub(b"\r\nx-declined-upgrade:", head) + end + rest
        super().data_received(data)
        if self._head_complete or not self._in_message:
            self._head_bytes = 0
            return
        self._head_bytes += len(data)
        if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(f"The headers are larger than {MAX_HEAD_BYTES} bytes")

    def on_message_begin(self) -> None:
        self._in_message, self._head_complete = True, False
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._head_complete = True
        super().on_headers_complete()
        # uvicorn makes the cycles by itself
        if self.scope["http_version"] == "1.0":
            self.cycle.__class__ = _UnchunkedCycle
        else:
            cycle: Any = self.cycle
            cycle.__class__ = _ChunkedCycle
            cycle.scope[WRITE_CHUNK] = cycle.write_chunk

    def on_message_complete(self) -> None:
        self._in_message = False
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        body = tgi_error(MalformedError(msg))
        head = (
            "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nx-request-id: {uuid.uuid4().hex}\r\n"
            "connection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


class _ChunkedCycle(RequestResponseCycle):
    """A response to an HTTP/1.1 client."""

    def write_chunk(self, data: bytes) -> bool:
        """Writes a chunk in the middle of a body at once, past the coroutines of ASGI.

        False, and nothing is done, where that is not possible now: `send` knows what to do.
        """
        if self.flow.write_paused or self.disconnected or not self.chunked_encoding:
            return False
        if self.response_complete or not self.response_started:
            return False
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        return True


class _UnchunkedCycle(RequestResponseCycle):
    """A response to an HTTP/1.0 client: without a length it goes on until the connection ends."""

    _until_close = False

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            names = {name for name, _ in message.get("headers", ())}
            self._until_close = b"content-length" not in names
            if self._until_close:
                self.chunked_encoding = False
        elif self._until_close:
            self.expected_content_length = len(message.get("body", b""))
        await super().send(message)
