"""The floors of quality that headgate.bench.quality knows, on the first part of its text."""

from __future__ import annotations

import pytest

from headgate.bench.quality import FLOORS, MEDIUM, measure
from headgate.kernels import ops
from headgate.kernels.quantised import KINDS
from headgate.launcher.embedded_model import ensure_embedded_model

TOKENS = 400


def test_every_kind_has_a_floor() -> None:
    assert FLOORS.keys() == {MEDIUM, *KINDS}


def test_every_kind_is_good_enough() -> None:
    before = ops.active()
    if ops.use() == "reference":
        pytest.skip("without a compiler this would take minutes")
    try:
        for found in measure(ensure_embedded_model(), list(FLOORS), TOKENS):
            assert found.tokens == TOKENS - 1
            assert found.good_enough, found
    finally:
        ops.use(before)
