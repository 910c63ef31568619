"""The two files of a batch: requests as OpenAI's batch lines, and what was written of the results.

Knows no server. A line that is no request becomes a `Bad`, with what to write in its place.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

URLS = ("/v1/chat/completions", "/v1/completions")


@dataclass(frozen=True, slots=True)
class Request:
    """A line of the input."""

    line: int  # from 1
    custom_id: str
    url: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Bad:
    """A line of the input that is no request."""

    line: int
    custom_id: str | None
    code: str
    message: str


def read_requests(path: Path, done: Done) -> Iterator[Request | Bad]:
    """The lines that have no result yet; empty lines don't count. Raises OSError."""
    seen: set[str] = set()
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            if not raw.strip() or number in done.lines:
                continue
            read = read_line(raw, number)
            if isinstance(read, Request):
                if read.custom_id in seen:
                    message = f"custom_id {read.custom_id!r} is that of an earlier line"
                    yield Bad(number, read.custom_id, "duplicate_custom_id", message)
                    continue
                seen.add(read.custom_id)
                if read.custom_id in done.custom_ids:
                    continue
            yield read


def read_line(raw: bytes, number: int) -> Request | Bad:
    """One line as a request."""
    custom_id: str | None = None
    try:
        given = json.loads(raw)
        if not isinstance(given, dict):
            raise ValueError("it is not a JSON object")
        if isinstance(given.get("custom_id"), str):
            custom_id = given["custom_id"]
        if not custom_id:
            raise ValueError("`custom_id` must be a string that is not empty")
        if given.get("method", "POST") != "POST":
            raise ValueError("`method` must be POST")
        url, body = given.get("url"), given.get("body")
        if url not in URLS:
            raise ValueError(f"`url` must be one of {', '.join(URLS)}, not {url!r:.80}")
        if not isinstance(body, dict):
            raise ValueError("`body` must be a JSON object")
        if body.get("stream"):
            raise ValueError("`stream` cannot be used in a batch")
    except (ValueError, RecursionError) as error:
        what = "it is not JSON" if isinstance(error, json.JSONDecodeError) else str(error)
        return Bad(number, custom_id or None, "invalid_line", f"line {number}: {what}")
    return Request(number, custom_id, url, body)


@dataclass(frozen=True, slots=True)
class Done:
    """What an output file says already."""

    custom_ids: frozenset[str] = frozenset()
    lines: frozenset[int] = frozenset()  # of the input that were no requests
    failed: int = 0  # results that are not 200

    @classmethod
    def of(cls, path: Path) -> Done:
        """Cuts off what a killed run left half-written. Raises OSError, ValueError for a file
        that is no output."""
        if not path.exists():
            return cls()
        custom_ids, lines, failed, whole = set(), set(), 0, 0
        with path.open("rb") as stream:
            for raw in stream:
                if not raw.endswith(b"\n"):
                    break
                entry = _entry(raw, path)
                whole += len(raw)
                error, response = entry["error"], entry["response"]
                failed += not response or response.get("status_code") != 200
                if error and "line" in error:
                    lines.add(error["line"])
                else:
                    custom_ids.add(entry["custom_id"])
        if whole < path.stat().st_size:
            os.truncate(path, whole)
        return cls(frozenset(custom_ids), frozenset(lines), failed)


def _entry(raw: bytes, path: Path) -> dict[str, Any]:
    try:
        entry = json.loads(raw)
        if {"custom_id", "response", "error"} <= entry.keys():
            return dict(entry)
    except (ValueError, AttributeError):
        pass
    raise ValueError(f"{path} is not the output of a batch: {raw[:60].decode('utf-8', 'replace')}")
