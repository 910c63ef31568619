"""Kernels compiled ahead of time: they fit the chips, and docs/kernels.md says what they take."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]


def report(*flags: str) -> subprocess.CompletedProcess[str]:
    """The report in a process of its own: the interpreter compiles nothing."""
    return subprocess.run(
        [sys.executable, "-m", "headgate.kernels.triton.report", *flags],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.mark.parametrize(
    ("op", "chip"), [("paged_attention", "sm_90"), ("rms_norm_residual", "sm_89")]
)
def test_a_sample_is_as_the_page_says(op: str, chip: str) -> None:
    done = report("--check", "--only", op, "--chips", chip)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.exhaustive
@pytest.mark.parametrize("chip", ["sm_80", "sm_89", "sm_90", "sm_100"])
def test_every_kernel_is_as_the_page_says(chip: str) -> None:
    done = report("--check", "--chips", chip)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_kernel_that_spills_or_loads_narrowly_is_named() -> None:
    from headgate.kernels.triton.compiled import Compiled
    from headgate.kernels.triton.report import Row, differences, problems_of

    bad = Compiled("kernel", "sm_80", 8, 255, 8, 0, 200 << 10, "", 8, has_dot=True)
    row = Row("op", "kernel", ["shape"], {"sm_80": bad})
    found = list(problems_of([row]))
    assert len(found) == 4
    for text in ("8 bytes of registers", "shared memory", "tensor cores", "loads of 8 bytes"):
        assert any(text in problem for problem in found)
    assert not any("spilled" in problem for problem in replace(bad, spillable=8).problems)
    crowded = replace(bad, spilled=0, shared=120 << 10, warps=4, products="mma.sync")
    assert crowded.problems == ["4 warps on a processor, 8 hide waits"]
    assert replace(crowded, registers=64, shared=30 << 10).warps_at_once == 20
    assert list(differences([row], "| op | kernel | shape | 255 r, 1 KB, 0 w | x | x | x |"))
    line = "| op | kernel | shape | 255 r, 200 KB, 0 w | x | x | x |"
    assert not list(differences([row], line))
    # A kernel that an operation starts twice has two lines, in order.
    other = Row("op", "kernel", ["shape"], {"sm_80": replace(bad, registers=9)})
    both = f"{line}\n{line.replace('255', '9')}"
    assert not list(differences([row, other], both))
    assert len(list(differences([other, row], both))) == 2
