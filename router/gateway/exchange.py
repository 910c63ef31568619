"""One HTTP request and its response, over plain ASGI: body with a limit, headers, disconnects.

Knows no API: bodies are decoded into the struct a route asks for, answers are bytes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec
from starlette.types import Message, Receive, Scope, Send

from headgate.router.errors import (
    MalformedError,
    PayloadTooLargeError,
    UnsupportedMediaTypeError,
    ValidationError,
)
from headgate.router.gateway.errors import ClientGoneError

logger = logging.getLogger(__name__)

T = TypeVar("T")
S = TypeVar("S", bound=msgspec.Struct)
Headers = list[tuple[bytes, bytes]]

JSON_HEADERS: Headers = [(b"content-type", b"application/json")]
MAX_REQUEST_ID = 128  # characters
WRITE_CHUNK = "headgate.write_chunk"  # a scope's key: see http_protocol.py
_MAX_WARNED_FIELDS = 16
_MAX_SHOWN_NAME = 64
_UNREAD = object()


class Exchange:
    """A request being answered. Made by the app, handed to the route."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, *, strict: bool) -> None:
        self.started_at = time.monotonic()
        self.path: str = scope["path"]
        self.method: str = scope["method"]
        self.request_id: str = scope["headgate.request_id"]
        self.path_params: dict[str, Any] = scope.get("path_params", {})
        self.raw_headers: Headers = scope["headers"]
        self.response_started = False
        self.submitted = False  # the router has the request: it logs and counts what comes of it
        self.warnings: list[str] = []
        self._body_was_read = False
        self._raw: Any = _UNREAD
        self.field_names: Mapping[str, str] = {}  # the router's names of fields to this route's
        self._strict = strict
        self._write_chunk: Callable[[bytes], bool] | None = scope.get(WRITE_CHUNK)
        self._receive = receive
        self._send = send
        self._gone: asyncio.Task[None] | None = None

    def header(self, name: bytes) -> bytes:
        """The first value of a request header (name in lower case), or empty."""
        return next((value for key, value in self.raw_headers if key == name), b"")

    # -------------------------------------------------------------- request

    async def read_json(self, cls: type[S], limit: int) -> S:
        """The body as a `cls`; names of unknown fields are kept in `warnings`.

        Raises PayloadTooLargeError, MalformedError, UnsupportedMediaTypeError, ValidationError.
        """
        return self.convert(await self.read_raw(limit), cls)

    def convert(self, raw: Any, cls: type[S], where: str = "") -> S:
        """A part of the body as a `cls`, as `read_json`. `where`: the path of the part."""
        prefix = f"{where}." if where else ""
        parsed = convert(raw, cls, prefix)
        self._note_unknown(unknown_fields(raw, cls, prefix))
        return parsed

    async def read_raw(self, limit: int) -> Any:
        """The body's JSON, kept for the next reader. Raises as `read_json`, but ValidationError."""
        if self._raw is _UNREAD:
            self._raw = self._parse(await self._read_body(limit))
        return self._raw

    def _parse(self, body: bytes) -> Any:
        try:
            return msgspec.json.decode(body)
        except UnicodeDecodeError as error:
            raise MalformedError(f"The body is not valid UTF-8: {error.reason}") from None
        except RecursionError:
            raise MalformedError("The body is nested too deeply") from None
        except msgspec.DecodeError as error:
            content_type = self.header(b"content-type").decode("latin-1")
            if content_type and "json" not in content_type.lower():
                raise UnsupportedMediaTypeError(
                    f"Expected a JSON body, got `content-type: {content_type[:_MAX_SHOWN_NAME]}`"
                ) from None
            raise MalformedError(f"The body is not valid JSON: {error}") from None

    async def _read_body(self, limit: int) -> bytes:
        too_large = PayloadTooLargeError(f"The body is larger than {limit} bytes")
        length = self.header(b"content-length")
        if length.isdigit() and int(length) > limit:
            raise too_large
        chunks: list[bytes] = []
        size = 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > limit:
                raise too_large
            chunks.append(chunk)
            if not message.get("more_body", False):
                self._body_was_read = True
                return b"".join(chunks)

    def _note_unknown(self, names: list[str]) -> None:
        if not names:
            return
        if self._strict:
            raise ValidationError(f"unknown field `{_shown(names[0])}`", field=names[0])
        shown = ", ".join(_shown(name) for name in names[:_MAX_WARNED_FIELDS])
        self.warnings.append(f"unknown fields ignored: {shown}")
        logger.info(
            "unknown fields ignored",
            extra={"fields": {"request_id": self.request_id, "route": self.path, "names": shown}},
        )

    def warn_ignored(self, field: str, values: Sequence[str]) -> None:
        """Says that these values of a known field have no effect; with --strict it is refused."""
        if not values:
            return
        shown = ", ".join(_shown(value) for value in values[:_MAX_WARNED_FIELDS])
        if self._strict:
            raise ValidationError(f"`{field}` = {shown} is not supported", field=field)
        self.warnings.append(f"{field} ignored: {shown}")

    # ----------------------------------------------------------- disconnects

    async def until(self, awaitable: Awaitable[T]) -> T:
        """Waits for `awaitable`, but no longer than the client stays. Raises ClientGoneError."""
        if self._gone is None:
            self._gone = asyncio.ensure_future(self._watch())
        future = asyncio.ensure_future(awaitable)
        try:
            await asyncio.wait((future, self._gone), return_when=asyncio.FIRST_COMPLETED)
            if future.done():
                return future.result()
            raise ClientGoneError
        finally:
            if not future.done():
                future.add_done_callback(_mark_seen)
                future.cancel()

    def close(self) -> None:
        """Ends the watch for a disconnect."""
        if self._gone is not None:
            self._gone.cancel()

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    # -------------------------------------------------------------- response

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.response_started = True
        await self._send(message)

    @property
    def send_body(self) -> Send:
        """The bare `send`, for body messages of a stream that has been started."""
        return self._send

    @property
    def write_chunk(self) -> Callable[[bytes], bool] | None:
        """A shorter way for body messages in the middle of a stream, where the server has one."""
        return self._write_chunk

    async def respond(
        self, body: bytes, *, status: int = 200, headers: Headers = JSON_HEADERS
    ) -> None:
        """A whole response; warnings and content-length are added."""
        await self.start(status, [*headers, (b"content-length", str(len(body)).encode())])
        await self.send({"type": "http.response.body", "body": body, "more_body": False})

    async def start(self, status: int, headers: Headers) -> None:
        """Status line and headers; warnings are added."""
        if self.warnings:
            headers = [*headers, (b"x-headgate-warnings", "; ".join(self.warnings).encode())]
        if not self._body_was_read and self.header(b"expect"):
            # The client need not send its body now: what comes next might be another request.
            headers = [*headers, (b"connection", b"close")]
        await self.send({"type": "http.response.start", "status": status, "headers": headers})


def _mark_seen(future: asyncio.Future[Any]) -> None:
    """Keeps asyncio from logging the outcome of what nobody waits for any more."""
    if not future.cancelled():
        future.exception()


# ------------------------------------------------------------------ decoding


def convert(raw: Any, cls: type[S], prefix: str = "") -> S:
    """JSON values as a `cls`; 3.0 is a whole number too, as JSON Schema has it.

    Raises ValidationError that names the field, after `prefix`.
    """
    try:
        return msgspec.convert(raw, cls)
    except msgspec.ValidationError:
        raw = _with_whole_numbers(raw)
    try:
        return msgspec.convert(raw, cls)
    except msgspec.ValidationError as error:
        text, _, path = str(error).partition(" - at `$")
        path = path.rstrip("`").removeprefix(".")
        _, found, name = text.partition("missing required field `")
        if found:
            field = prefix + f"{path}.{name.rstrip('`')}".removeprefix(".")
            raise ValidationError(f"missing field `{field}`", field=field) from None
        path = (prefix + path).rstrip(".")
        where = f"`{path}`: " if path else ""
        raise ValidationError(where + text[:1].lower() + text[1:], field=path) from None


def _with_whole_numbers(raw: Any) -> Any:
    """The same values, floats that are whole as integers."""
    if isinstance(raw, float):
        return int(raw) if raw.is_integer() else raw
    if isinstance(raw, list):
        return [_with_whole_numbers(entry) for entry in raw]
    if isinstance(raw, dict):
        return {key: _with_whole_numbers(entry) for key, entry in raw.items()}
    return raw


def unknown_fields(raw: Any, cls: type[msgspec.Struct], prefix: str = "") -> list[str]:
    """Dotted names of the keys that `cls`, and structs in its fields, do not have.

    A key whose value is null is as if absent.
    """
    if not isinstance(raw, dict):
        return []
    names: list[str] = []
    nested = _nested_structs(cls)
    for key, value in raw.items():
        if key not in cls.__struct_encode_fields__:
            if value is not None:
                names.append(prefix + key)
        elif key in nested and isinstance(value, list):
            for index, entry in enumerate(value):
                names.extend(unknown_fields(entry, nested[key], f"{prefix}{key}[{index}]."))
        elif key in nested:
            names.extend(unknown_fields(value, nested[key], f"{prefix}{key}."))
    return names


_NESTED: dict[type[msgspec.Struct], dict[str, type[msgspec.Struct]]] = {}


def _nested_structs(cls: type[msgspec.Struct]) -> dict[str, type[msgspec.Struct]]:
    """Fields of `cls` that are structs or lists of them, optional ones included; kept."""
    if cls not in _NESTED:
        found: dict[str, type[msgspec.Struct]] = {}
        for field in msgspec.inspect.type_info(cls).fields:  # type: ignore[attr-defined]
            kinds = getattr(field.type, "types", (field.type,))
            for kind in kinds:
                kind = getattr(kind, "item_type", kind)
                if isinstance(kind, msgspec.inspect.StructType):
                    found[field.encode_name] = kind.cls
        _NESTED[cls] = found
    return _NESTED[cls]


def _shown(name: str) -> str:
    """A client's own word, fit for a header and a log line."""
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in name[:_MAX_SHOWN_NAME])
