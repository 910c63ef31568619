"""Threads that compute together keep apart (processors.h): a program of its own finds that out."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from headgate.kernels.cpu import build


def test_a_thread_leaves_the_processor_of_another(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no compiler")
    program, source = tmp_path / "processors", Path(__file__).with_name("processors.cpp")
    command = [compiler, "-std=c++17", "-O1", f"-I{build.SOURCES}", source, "-o", program]
    subprocess.run(command, check=True)
    printed = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    processors, beside, elsewhere, asleep, alone, still_free = map(int, printed.split())
    if processors < 2:
        pytest.skip("one processor")
    # The system moves threads too, if seldom.
    assert beside > 40
    assert elsewhere < 25
    assert asleep < 25
    assert alone == 0
    assert still_free
