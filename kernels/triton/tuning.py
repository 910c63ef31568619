"""Tiles by chip and shape: winners of measurements where there are any, else defaults.

`tuning.json` holds what `python -m headgate.kernels.triton.tune` measured:

    {"sm_90": {"linear_int4": {"28672x4096/gptq": {"columns": 64, ...}}}}

A key names what the tile may depend on: widths, head shapes, the KV block size. Only where no tile
decides the order of a sum does it name a number of rows as well (docs/kernels.md, exactness).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from headgate.kernels.triton.launch import chip

_FILE = Path(__file__).with_name("tuning.json")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LinearTile:
    """A matrix product's tile: `rows` x `columns` of the result, `inner` of the sum at a time."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class AttentionTile:
    """`rows` queries (tokens x heads of a group) against `keys` positions at a time.

    Where every row has one token, `decode_rows` and `decode_warps` take the place of the others.
    """

    rows: int
    decode_rows: int
    keys: int
    warps: int
    decode_warps: int
    stages: int


MANY = 1 << 30  # rows: more than there are


def tile_for(rows: int, tiles: dict[str, dict[int, LinearTile]]) -> tuple[str, LinearTile]:
    """(its name in a key, the tile) for so many rows. tiles: of each chip, "" for all others, by
    the most rows they are for, in ascending order, the last one for all that are left."""
    of_chip = tiles.get(chip(), tiles[""])
    most = next(most for most in of_chip if rows <= most)
    return "many" if most == MANY else str(most), of_chip[most]


_choose: Callable[[str, str, Any], Any] | None = None


def tuned(op: str, key: str, default: T) -> T:
    """`default`, a tile, with what was found best for `key` on the chip in use."""
    found = _winners().get(chip(), {}).get(op, {}).get(key)
    tile = replace(default, **found) if found else default  # type: ignore[type-var]
    return tile if _choose is None else _choose(op, key, tile)


@contextmanager
def choosing(choose: Callable[[str, str, Any], Any]) -> Iterator[None]:
    """In the block `choose(op, key, tile)` has the last word on every tile."""
    global _choose
    before, _choose = _choose, choose
    try:
        yield
    finally:
        _choose = before


@cache
def _winners() -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    return json.loads(_FILE.read_text(encoding="utf-8"))


def record_winner(chip_name: str, op: str, key: str, tile: Any) -> None:
    """Keeps `tile` as the best for `key`; sorted, so that changes read well in a diff."""
    winners = json.loads(_FILE.read_text(encoding="utf-8"))
    values = {item.name: getattr(tile, item.name) for item in fields(tile)}
    winners.setdefault(chip_name, {}).setdefault(op, {})[key] = values
    _FILE.write_text(json.dumps(winners, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    _winners.cache_clear()
