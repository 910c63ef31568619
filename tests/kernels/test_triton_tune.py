"""Choosing tiles, with times made up: measuring them takes a GPU."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton")

from headgate.kernels.triton import BATCH_INVARIANT, tune, tuning
from headgate.kernels.triton import launch as launch_module
from headgate.kernels.triton.cases import MODELS, STEPS, Case, Maker, product_cases
from headgate.kernels.triton.launch import recording
from headgate.kernels.triton.tune import best_tile, keys_of
from tests.kernels.randoms import Randoms, assert_near


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
    for (op, _), (tile, asking) in keys.items():
        assert isinstance(tile, tuning.LinearTile)
        by_rows = op in ("linear_int8", "linear_weight_only")  # a tile for few rows, one for many
        assert len(asking) == (1 if by_rows else len(STEPS))


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


@pytest.fixture
def winners(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty file of winners in the place of the repository's."""
    file = tmp_path / "tuning.json"
    file.write_text("{}")
    monkeypatch.setattr(tuning, "_FILE", file)
    tuning._winners.cache_clear()
    yield file
    monkeypatch.undo()
    tuning._winners.cache_clear()


def test_winners_are_kept(winners: Path) -> None:
    tile = tuning.LinearTile(16, 128, 64, 8, 4)
    tuning.record_winner("sm_90", "op", "key", tile)
    assert json.loads(winners.read_text())["sm_90"]["op"]["key"]["columns"] == 128
    with recording("sm_90"):
        assert tuning.tuned("op", "key", tuning.LinearTile(1, 1, 1, 1, 1)) == tile
        assert tuning.tuned("op", "other", tile) is tile


def test_what_was_tuned_is_launched(
    winners: Path, monkeypatch: pytest.MonkeyPatch, randoms: Randoms
) -> None:
    """`make tune-gpu` on a chip that is not there, and operations that then run on it."""

    def seconds_of(case: Case) -> float:
        """The more the tile's columns, or keys, and its warps the better."""
        with recording("sm_89") as launches:
            case.make(Maker("meta"))()
        tiled = [launch for launch in launches if "ROWS" in launch.constants]
        sizes = [
            launch.warps * launch.constants.get("KEYS", launch.constants.get("COLUMNS"))
            for launch in tiled
        ]
        return 1 / (1 + sum(sizes))

    monkeypatch.setattr(launch_module, "_present_chip", lambda: "sm_89")
    monkeypatch.setattr(tune, "gpu_name", lambda: "a GPU")
    monkeypatch.setattr(tune, "seconds_of", seconds_of)
    monkeypatch.setattr(sys, "argv", ["tune"])
    assert tune.main() == 0
    found = json.loads(winners.read_text())
    products = {"linear_dense", "linear_int8", "linear_int4", "linear_fp8", "grouped_linear"}
    products |= {"linear_weight_only"}
    assert set(found) == {"sm_89"} and set(found["sm_89"]) == products | {"paged_attention"}
    for chip, taken in (("sm_89", (128, 8)), ("sm_90", (64, 4))):
        with recording(chip) as launches:
            for case in cases():
                case.make(Maker("meta"))()
        tiles = {
            (launch.constants["COLUMNS"], launch.warps)
            for launch in launches
            if launch.kernel.__name__ == "linear_int4_kernel"
        }
        assert tiles == {taken}
    # And on the device, where another tile gives the same result.
    x, weight = randoms(5, 64), randoms(40, 64)
    tile = tuning.LinearTile(16, 16, 16, 4, 2)
    tuning.record_winner("sm_89", "linear_dense", "40x64/float32", tile)
    used: list[object] = []

    def note(op: str, key: str, tile: object) -> object:
        used.append(tile)
        return tile

    with tuning.choosing(note):
        got = BATCH_INVARIANT["linear"](x, weight, None)
    assert used == [tile]
    assert_near(got, x @ weight.T, 4)
