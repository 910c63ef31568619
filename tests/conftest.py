"""Settings and fixtures that all tests share. Being here also puts the repository on sys.path."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before torch is imported: tests run beside one another, and their tensors are tiny.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before triton is imported: without a GPU its kernels run in the interpreter.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with 9 heads in 3 groups, made once per session. Do not write into it."""
    from tests.checkpoints import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture
def reference_kernels() -> Iterator[None]:
    """Operations are the reference's during the test."""
    from headgate.kernels import ops

    before = ops.active()
    ops.use("reference")
    yield
    ops.use(before)


@pytest.fixture
def cpu_kernels() -> Iterator[None]:
    """Operations are the C++'s during the test."""
    from headgate.kernels import ops

    before = ops.active()
    if ops.use("", "cpu") != "cpu":
        pytest.skip("the C++ kernels are not built")
    yield
    ops.use(before)


@pytest.fixture
def triton_kernels() -> Iterator[None]:
    """Operations are Triton's during the test, by the interpreter where there is no GPU."""
    from headgate.kernels import ops
    from tests import triton_interpreter

    triton_interpreter.quicken()
    before = ops.active()
    ops.use("triton")
    yield
    ops.use(before)


@pytest.fixture
def unwatched_triton(triton_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's kernels in use; what they do is the device's doing."""
    from tests.unit.fake_device import Unwatched

    interpreter = pytest.importorskip("triton.runtime.interpreter")
    run = interpreter.GridExecutor.__call__

    def unwatched(*args: object, **kwargs: object) -> object:
        with Unwatched():
            return run(*args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", unwatched)
