"""Log records as JSON lines on standard error; the launcher renders them for people.

Each line: {"time", "level", "process", "message", ...fields}. Give fields with
`logger.info("text", extra={"fields": {...}})`.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import datetime, timezone

LEVELS = ("trace", "debug", "info", "warn", "error")


class JsonLines(logging.Formatter):
    """One JSON object per record."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(
                timespec="milliseconds"
            ),
            "level": "warn" if record.levelname == "WARNING" else record.levelname.lower(),
            "process": self._process,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def set_up_logging(process: str, level: str | None = None) -> None:
    """Sends this process's records to standard error. `level` defaults to LOG_LEVEL, then info."""
    name = (level or os.environ.get("LOG_LEVEL") or "info").lower()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(process))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(
        {"trace": "DEBUG", "warn": "WARNING"}.get(name, name.upper()) if name in LEVELS else "INFO"
    )
