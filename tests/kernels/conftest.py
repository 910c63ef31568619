"""Fixtures of the kernels' tests."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headgate.kernels import cpu
from headgate.kernels.cpu import library
from tests import triton_interpreter
from tests.kernels import emulated_avx512
from tests.kernels.randoms import Randoms


def pytest_configure(config: pytest.Config) -> None:
    """`make test-avx512` says where the emulated kernels are to be; before tests are collected."""
    if directory := os.environ.get("HEADGATE_EMULATED_AVX512"):
        emulated_avx512.use(Path(directory))


@pytest.fixture(params=["avx512", "avx2", "generic"])
def cpu_kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """The C++ kernels of one instruction set; fresh tensors are full of NaN, so that what an
    operation forgets to write is seen."""
    if shutil.which("g++") is None and not cpu.available():
        pytest.skip("no compiler, and no library built before")
    assert cpu.available()
    loaded = library.load()
    assert loaded is not None
    best = loaded.hg_init(b"")
    if loaded.hg_init(request.param.encode()) is None:
        loaded.hg_init(best)
        pytest.skip(f"this machine has no {request.param}")
    threads = loaded.hg_num_threads()
    cpu.set_num_threads(2)
    torch.use_deterministic_algorithms(True)  # which fills new tensors
    yield request.param
    torch.use_deterministic_algorithms(False)
    cpu.set_num_threads(threads)
    loaded.hg_init(best)


@pytest.fixture
def triton_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where the Triton kernels run: the GPU, or the CPU by the interpreter. Fresh tensors are full
    of NaN here too."""
    triton = pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not triton.knobs.runtime.interpret:
        pytest.skip("neither a GPU nor the interpreter")
    if device == "cpu":
        triton_interpreter.quicken()
        _sum_tiles_in_float64(monkeypatch)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield device
    torch.use_deterministic_algorithms(False)


def _sum_tiles_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy's product of float32 tiles has, on some processors, other bits in a tile of another
    shape. Those of tensor cores have the same."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    in_float32 = InterpreterBuilder.create_dot

    def dot(builder: Any, a: Any, b: Any, total: Any, *options: Any) -> Any:
        if a.data.dtype != np.float32 or b.data.dtype != np.float32:
            return in_float32(builder, a, b, total, *options)
        product = a.data.astype(np.float64) @ b.data.astype(np.float64)
        return TensorHandle(product.astype(np.float32) + total.data, total.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)


@pytest.fixture
def randoms(triton_device: str) -> Randoms:
    """Fresh numbers at every run; a failure shows the seed."""
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    return Randoms(triton_device, seed)
