"""The profile of steps: all of a step's calls, with floors, and Python's share beside them."""

from __future__ import annotations

from pathlib import Path

import pytest

from headgate.bench.roofline import Roofline
from headgate.bench.step_profile import Case, Profiler, Stored, table
from headgate.kernels import cpu, ops


@pytest.mark.parametrize(
    ("quantize", "precision"), [("", "highest"), ("", "medium"), ("int8", "highest")]
)
def test_profile(tiny_llama: Path, quantize: str, precision: str) -> None:
    if not cpu.available():
        pytest.skip("the C++ kernels are not built")
    before = ops.active()
    try:
        roofline = Roofline(threads=1, fma_gflops=100.0, vnni_gops=400.0, memory_gb_s=10.0)
        cache = "float16" if quantize else "float32"
        stored = Stored("bfloat16", quantize, precision, cache)
        profiler = Profiler(str(tiny_llama), stored, roofline)
        for case in (Case(3, 1, 40), Case(1, 20, 60)):
            milliseconds, lines = profiler.measure(case, 2)
            matrices = [line for name, line in lines.items() if name.startswith("linear")]
            assert sum(line.calls for line in matrices) == 4 * 2 + 1
            assert all(line.floor > 0 for line in (*matrices, lines["paged attention"]))
            assert lines["rms norm"].calls == 2 * 2 + 1
            within = sum(line.microseconds for line in lines.values()) / 1e3
            assert 0 < within < milliseconds
            text = "\n".join(table(case, milliseconds, lines))
            assert "Python" in text and case.name[1:] in text
    finally:
        ops.use(before)
