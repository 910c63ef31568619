"""The floors of quality that headgate.bench.quality knows, on the first part of its text."""

from __future__ import annotations

import pytest

from headgate.bench.quality import FLOORS, MEDIUM, PLAIN, measure
from headgate.kernels import ops
from headgate.launcher.embedded_model import ensure_embedded_model
from headgate.quant_kinds import KINDS

TOKENS = 400


def test_every_kind_has_a_floor() -> None:
    assert FLOORS.keys() == {PLAIN, MEDIUM, *KINDS}


def test_every_kind_is_good_enough() -> None:
    before = ops.active()
    if ops.use() == "reference":
        pytest.skip("without a compiler this would take minutes")
    try:
        for found in measure(ensure_embedded_model(), list(FLOORS), TOKENS):
            assert found.tokens == TOKENS - 1
            assert found.good_enough, found
        (int8,) = measure(ensure_embedded_model(), [PLAIN], TOKENS, "int8")
        assert int8.good_enough and int8.same_tokens < 1, int8
    finally:
        ops.use(before)
