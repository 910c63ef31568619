"""What the machine can do at best, measured beside each benchmark by a small C program."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

_SOURCE = Path(__file__).parent / "roofline.c"
_SECONDS = 120


class RooflineError(RuntimeError):
    """No compiler, or the program failed."""


@dataclass(frozen=True, slots=True)
class Roofline:
    """Over all threads together."""

    threads: int
    fma_gflops: float  # float32 multiply-add
    vnni_gops: float  # int8 products; 0 on a machine without the instruction
    memory_gb_s: float  # reading, far beyond the caches, in huge pages where the system gives them
    bf16_gflops: float = 0.0  # products of bfloat16 pairs; 0 on a machine without the instruction
    small_pages_gb_s: float = 0.0  # reading in pages of 4 KB
    core_to_core_ns: float = 0.0  # a cache line's way; short where cores share a cache; 0: one core


def measure(threads: int) -> Roofline:
    """Compiles and runs the program. Raises RooflineError."""
    compiler = shutil.which(os.environ.get("CC") or "cc") or shutil.which("gcc")
    if compiler is None:
        raise RooflineError("no C compiler (cc or gcc, or the one named by CC)")
    with tempfile.TemporaryDirectory(prefix="headgate-roofline-") as folder:
        program = f"{folder}/roofline"
        command = [compiler, "-O3", "-march=native", "-pthread", "-o", program, str(_SOURCE)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
            answer = subprocess.run(
                [program, str(threads)],
                check=True,
                capture_output=True,
                text=True,
                timeout=_SECONDS,
            )
        except subprocess.SubprocessError as error:
            detail = getattr(error, "stderr", None) or str(error)
            raise RooflineError(f"the roofline program failed: {detail}") from error
    return Roofline(**json.loads(answer.stdout))
