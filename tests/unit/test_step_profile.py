"""The profile of steps: all of a step's calls, with floors, and Python's share beside them."""

from __future__ import annotations

from pathlib import Path

import pytest

from headgate.bench.roofline import Roofline
from headgate.bench.step_profile import KINDS, Profiler
from headgate.bench.step_tables import Case, calls_table, growth_table, kinds_table
from headgate.kernels import cpu, ops


@pytest.mark.parametrize("kind", ["bf16", "bf16-medium", "int8"])
def test_profile(tiny_llama: Path, kind: str) -> None:
    if not cpu.available():
        pytest.skip("the C++ kernels are not built")
    before = ops.active()
    try:
        roofline = Roofline(threads=1, fma_gflops=100.0, vnni_gops=400.0, memory_gb_s=10.0)
        profiler = Profiler(str(tiny_llama), KINDS[kind], roofline)
        found = {}
        for case in (Case(3, 1, 40), Case(1, 20, 60)):
            found[case] = step = profiler.measure(case, 2)
            lines = step.lines
            matrices = [line for name, line in lines.items() if name.startswith("linear")]
            assert sum(line.calls for line in matrices) == 4 * 2 + 1
            assert all(line.floor > 0 for line in (*matrices, lines["paged attention"]))
            assert lines["rms norm"].calls == 1  # the last; the others are part of products
            assert 0 < step.part("linear") < step.part("") < step.milliseconds
            text = "\n".join(calls_table(case, step))
            assert "Python" in text and case.name[1:] in text
        growth = list(growth_table("tokens", found.items()))
        kinds = list(kinds_table({kind: found, "again": found}))
        for text in (growth, kinds):
            rows = [line for line in text if line.startswith("|")]
            assert len(rows) == 2 + len(found) and len({row.count("|") for row in rows}) == 1
    finally:
        ops.use(before)
