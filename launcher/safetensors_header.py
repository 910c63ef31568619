"""Reads the headers of a checkpoint's safetensors files: names, shapes and types, no weights.

Enough to count parameters and to notice a damaged file in milliseconds; shards read the tensors.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

from headgate.launcher.errors import LaunchError

_LONGEST_HEADER = 100_000_000  # bytes; what the format's own library allows
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """What the headers of a checkpoint say together."""

    files: tuple[Path, ...]
    parameters: int  # elements of all tensors
    stored_bytes: int
    dtype: str  # of most elements, in safetensors' names: "BF16", "F16", "F32", ...


def read_weight_files(directory: Path) -> WeightFiles:
    """Reads every header. Raises LaunchError naming a file that is missing or damaged."""
    files = find_weight_files(directory)
    if not files:
        raise LaunchError(f"{directory} holds no *.safetensors files.")
    elements: dict[str, int] = {}
    stored = 0
    for file in files:
        for tensor in _read_header(file).values():
            count = math.prod(tensor["shape"])
            elements[tensor["dtype"]] = elements.get(tensor["dtype"], 0) + count
            stored += tensor["data_offsets"][1] - tensor["data_offsets"][0]
    most = max(elements, key=lambda dtype: elements[dtype], default="")
    return WeightFiles(tuple(files), sum(elements.values()), stored, most)


def find_weight_files(directory: Path) -> list[Path]:
    """The files the index names, else all *.safetensors. Raises LaunchError for a missing one."""
    index = directory / INDEX_NAME
    if not index.exists():
        return sorted(directory.glob("*.safetensors"))
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise LaunchError(f"{index} is not a readable index of weight files.") from None
    for name in names:
        if not (directory / name).is_file():
            raise LaunchError(f"{index} names {name}, but {directory} does not hold that file.")
    return [directory / name for name in names]


def _read_header(file: Path) -> dict[str, dict]:
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else _LONGEST_HEADER + 1
            if length > min(size - 8, _LONGEST_HEADER):
                raise LaunchError(f"{file} is damaged or cut short: it has no whole header.")
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except OSError as error:
        raise LaunchError(f"{file} cannot be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise LaunchError(f"{file} is damaged: its header is not that of safetensors.") from None
    missing = 8 + length + end - size
    if missing > 0:
        raise LaunchError(f"{file} is cut short: {missing} bytes are missing at its end.")
    return header
