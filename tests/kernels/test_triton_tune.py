"""Choosing tiles, with times made up: measuring them takes a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")

from headgate.kernels.triton import tuning
from headgate.kernels.triton.cases import MODELS, STEPS, Case, Maker, product_cases
from headgate.kernels.triton.launch import recording
from headgate.kernels.triton.tune import best_tile, keys_of


def cases() -> list[Case]:
    return [case for step in STEPS for case in product_cases(MODELS[0], step)]


def rows_of(case: Case) -> int:
    """Height of the tile that the case would take now."""
    with recording("sm_90") as launches:
        case.make(Maker("meta"))()
    return next(launch.constants["ROWS"] for launch in launches if "ROWS" in launch.constants)


def test_every_product_s_tile_can_be_chosen() -> None:
    keys = keys_of(cases())
    assert ("linear_int4", "28672x4096/awq") in keys
    for tile, asking in keys.values():
        assert isinstance(tile, tuning.LinearTile)
        assert len(asking) == len(STEPS)


def test_the_least_product_of_times_wins() -> None:
    key = ("linear_int4", "28672x4096/awq")
    default, asking = keys_of(cases())[key]

    def time(case: Case) -> float | None:
        rows = rows_of(case)
        if rows == 128:
            return None  # does not fit
        few = "decode" in case.step
        return {16: (1.0, 9.0), 32: (2.0, 2.0), 64: (4.0, 3.0)}[rows][0 if few else 1]

    assert best_tile(key, default, asking, time).rows == 32
    assert rows_of(asking[0]) == default.rows, "nothing stays chosen"
    assert best_tile(key, default, asking, lambda case: 1.0) == default
    assert best_tile(("another", "key"), default, asking, time) == default


def test_winners_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "tuning.json"
    file.write_text("{}")
    monkeypatch.setattr(tuning, "_FILE", file)
    tuning._winners.cache_clear()
    tile = tuning.LinearTile(16, 128, 64, 8, 4)
    tuning.record_winner("sm_90", "op", "key", tile)
    assert json.loads(file.read_text())["sm_90"]["op"]["key"]["columns"] == 128
    with recording("sm_90"):
        assert tuning.tuned("op", "key", tuning.LinearTile(1, 1, 1, 1, 1)) == tile
        assert tuning.tuned("op", "other", tile) is tile
    monkeypatch.undo()
    tuning._winners.cache_clear()
