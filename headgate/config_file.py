"""Process configuration as JSON: one frozen dataclass per process, written by the launcher."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration file that does not describe its dataclass."""


def load_config(cls: type[T], path: str | Path) -> T:
    """Reads a JSON object into the dataclass `cls`; lists become tuples.

    Raises ConfigError naming unknown and missing keys.
    """
    data: dict[str, Any] = json.loads(Path(path).read_text())
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(data.keys() - known.keys())
    required = {
        name for name, f in known.items() if f.default is MISSING and f.default_factory is MISSING
    }
    missing = sorted(required - data.keys())
    if unknown or missing:
        raise ConfigError(f"{path}: unknown keys {unknown}, missing keys {missing}")
    return cls(**{key: tuple(v) if isinstance(v, list) else v for key, v in data.items()})
