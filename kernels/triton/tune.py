"""`python -m headgate.kernels.triton.tune`: the fastest tiles on this GPU, for tuning.json.

Tries tiles for every key that an operation of the report asks for, over all steps that ask for it,
and keeps the one whose times have the least product: a tile serves few rows and many alike. One
that does not fit the chip is passed over. The file belongs to the repository: users wait for no
tuning.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from headgate.kernels.triton.cases import MODELS, Case, Maker
from headgate.kernels.triton.launch import chip, recording
from headgate.kernels.triton.on_gpu import cases_here, gpu_name, seconds_of
from headgate.kernels.triton.tuning import AttentionTile, choosing, record_winner

Key = tuple[str, str]  # operation, key
_LEAST_GAIN = 0.97  # of the default's time: less is noise


def candidates(default: Any) -> Iterator[Any]:
    """The default first, then its neighbours."""
    yield default
    if isinstance(default, AttentionTile):
        for rows, keys, warps, stages in itertools.product((64, 128), (32, 64), (4, 8), (2, 3)):
            yield replace(default, rows=rows, keys=keys, warps=warps, stages=stages)
        return
    shapes = itertools.product((16, 32, 64, 128), (64, 128), (4, 8), (3, 4))
    for rows, columns, warps, stages in shapes:
        yield replace(default, rows=rows, columns=columns, warps=warps, stages=stages)


def keys_of(cases: list[Case]) -> dict[Key, tuple[Any, list[Case]]]:
    """What the cases ask for, with its default and the cases that ask."""
    found: dict[Key, tuple[Any, list[Case]]] = {}
    for case in cases:
        asked: dict[Key, Any] = {}

        def note(op: str, key: str, tile: Any, asked: dict[Key, Any] = asked) -> Any:
            asked[op, key] = tile
            return tile

        with recording(chip()), choosing(note):
            case.make(Maker("meta"))()
        for key, tile in asked.items():
            found.setdefault(key, (tile, []))[1].append(case)
    return found


def best_tile(
    wanted: Key, default: Any, cases: list[Case], time: Callable[[Case], float | None]
) -> Any:
    """The candidate with the least product of times; the default where none is clearly better."""

    def cost(tile: Any) -> float:
        """The sum of the times' logarithms."""

        def choose(op: str, key: str, before: Any) -> Any:
            return tile if (op, key) == wanted else before

        with choosing(choose):
            times = [time(case) for case in cases]
        return math.inf if None in times else sum(math.log(found) for found in times if found)

    costs = [(cost(tile), tile) for tile in dict.fromkeys(candidates(default))]
    least, tile = min(costs, key=lambda pair: pair[0])
    return tile if least < costs[0][0] + len(cases) * math.log(_LEAST_GAIN) else default


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=MODELS[0].name, help='of the shapes; "" for all')
    options = parser.parse_args()
    if not gpu_name():
        print("there is no GPU that PyTorch can use here (or TRITON_INTERPRET is set)")
        return 2
    for (op, key), (default, cases) in keys_of(cases_here(options.model)).items():
        tile = best_tile((op, key), default, cases, seconds_of)
        print(f"{op} {key}: {tile}{' (the default)' if tile == default else ''}", flush=True)
        if tile != default:
            record_winner(chip(), op, key, tile)
    return 0


if __name__ == "__main__":
    sys.exit(main())
