"""The log: children's JSON lines and the launcher's own messages, for people or as JSON lines.

It writes to standard output, as TGI does; the sentence that ends a launch goes to standard error.
It keeps nothing: a child's last words are kept by process.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from datetime import datetime, timezone
from typing import Any, TextIO

LEVELS = ("trace", "debug", "info", "warn", "error")
_COLOURS = {"trace": "2", "debug": "2", "info": "32", "warn": "33", "error": "31"}
_STANDARD = ("time", "level", "process", "message", "traceback")


def log_level(environment: dict[str, str] | os._Environ[str]) -> str:
    """LOG_LEVEL as one of LEVELS: the first such word of it (TGI took filters), else info."""
    text = environment.get("LOG_LEVEL", "").lower().replace("warning", "warn")
    return next((word.strip() for word in text.split(",") if word.strip() in LEVELS), "info")


class LogOutput:
    """Where all log lines of a server come together."""

    def __init__(
        self,
        *,
        json_lines: bool = False,
        colour: bool = False,
        level: str = "info",
        out: TextIO | None = None,
        err: TextIO | None = None,
    ) -> None:
        self._json = json_lines
        self._colour = colour
        self._threshold = LEVELS.index(level)
        self._out = out or sys.stdout
        self._err = err or sys.stderr

    @classmethod
    def from_environment(cls, *, json_lines: bool) -> LogOutput:
        """With LOG_LEVEL, LOG_COLORIZE and NO_COLOR; colours on terminals only by default."""
        choice = os.environ.get("LOG_COLORIZE", "")
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        if choice in ("0", "1"):
            colour = choice == "1"
        return cls(json_lines=json_lines, colour=colour, level=log_level(os.environ))

    def log(self, level: str, message: str, **fields: Any) -> None:
        """A line of the launcher itself."""
        if LEVELS.index(level) >= self._threshold:
            self._write(self._out, self._record(level, message, **fields))

    def info(self, message: str, **fields: Any) -> None:
        """A line of the launcher at level info."""
        self.log("info", message, **fields)

    def warn(self, message: str, **fields: Any) -> None:
        """A line of the launcher at level warn."""
        self.log("warn", message, **fields)

    def block(self, title: str, rows: list[tuple[str, str]]) -> None:
        """A small table for people; one line of fields as JSON."""
        if self._threshold > LEVELS.index("info"):
            return
        if self._json:
            self.info(title, **{name.replace(" ", "_"): text for name, text in rows})
            return
        width = max(len(name) for name, _ in rows)
        self.info(title + "\n" + "\n".join(f"    {name:<{width}}  {text}" for name, text in rows))

    def fatal(self, message: str) -> None:
        """The sentence that ends the launch, to standard error."""
        self._flush(self._out)
        self._write(self._err, self._record("error", message))

    def child_line(self, process: str, line: str) -> None:
        """One line a child wrote: a JSON record of headgate.log, or any text."""
        record = parse_record(line)
        if record is None:
            if not line.strip():
                return
            record = self._record("info", line, raw=True) | {"process": process}
        record["process"] = process
        if self._json or not record.get("raw"):
            self._write(self._out, record)
        else:  # a traceback or a library's own message reads best as it came
            self._print(self._out, f"{self._paint(process, '36')} | {line}")

    def _record(self, level: str, message: str, **fields: Any) -> dict[str, Any]:
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        return {"time": now, "level": level, "process": "launcher", "message": message, **fields}

    def _write(self, stream: TextIO, record: dict[str, Any]) -> None:
        if self._json:
            self._print(stream, json.dumps(record, ensure_ascii=False, default=str))
        else:
            self._print(stream, self._for_people(record))

    def _for_people(self, record: dict[str, Any]) -> str:
        level = str(record.get("level", "info"))
        fields = " ".join(
            f"{key}={_field(value)}" for key, value in record.items() if key not in _STANDARD
        )
        text = (
            f"{self._paint(_local_time(str(record.get('time', ''))), '2')} "
            f"{self._paint(level.upper().ljust(5), _COLOURS.get(level, '0'))} "
            f"{self._paint(str(record.get('process', '')), '36')}: {record.get('message', '')}"
        )
        if fields:
            text += f" {self._paint(fields, '2')}"
        if record.get("traceback"):
            text += f"\n{record['traceback']}"
        return text

    def _paint(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._colour else text

    def _print(self, stream: TextIO, text: str) -> None:
        try:
            stream.write(text + "\n")
            stream.flush()
        except UnicodeEncodeError:
            self._print(stream, text.encode("ascii", "backslashreplace").decode())
        except (OSError, ValueError):
            pass  # whoever read the log has gone, or its disk is full; the server goes on

    def _flush(self, stream: TextIO) -> None:
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def parse_record(line: str) -> dict[str, Any] | None:
    """The JSON record in a line that headgate.log wrote; None for any other text."""
    if not line.startswith("{"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "message" in record else None


def _local_time(stamp: str) -> str:
    try:
        return datetime.fromisoformat(stamp).astimezone().strftime("%H:%M:%S.%f")[:-3]
    except ValueError:
        return stamp


def _field(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return json.dumps(text, ensure_ascii=False) if isinstance(value, str) and " " in text else text
