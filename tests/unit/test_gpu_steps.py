"""What `make test-gpu` and `make bench-gpu` do with whole steps, on a device that is not there."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from headgate.bench import gpu_steps
from headgate.kernels.triton import on_gpu
from headgate.kernels.triton.cases import GENERATORS, ModelShape, StepShape
from tests.unit.fake_device import FakeDevice, Waits

SMALLEST = gpu_steps.Shape("a smallest Llama", 128, 256, 1, 2, 1, 256)
CONFIG = {"device": "cpu", "dtype": "float32", "kv_cache_dtype": "float32", "num_blocks": 64}


@contextmanager
def never_waiting() -> Iterator[None]:
    with Waits() as waits:
        yield
    assert not waits.found


def test_steps_are_checked(
    unwatched_triton: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_steps, "TINY", SMALLEST)
    rows = gpu_steps.make_rows(2, 20, 4)
    assert gpu_steps.check(FakeDevice(), CONFIG, never_waiting, rows) == []
    assert capsys.readouterr().out.count("ok      tokens of steps") == 4


def test_every_operation_and_steps_are_timed_into_one_file_and_one_page(
    unwatched_triton: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`make bench-gpu` with small shapes, on the CPU; what a GPU alone has is put in its place."""
    name = "NVIDIA H100 80GB HBM3"
    shape = ModelShape("tiny", 128, 128, 8, 2, 16, 300, qk_norm=True, experts=4, ranks=2)
    step = StepShape("decode 3 at 40", 3, 1, 40)
    cases = [case for generate in GENERATORS for case in generate(shape, step)]
    monkeypatch.setattr(on_gpu, "_DEVICE", "cpu")
    monkeypatch.setattr(on_gpu, "_DOCS", tmp_path)
    monkeypatch.setattr(on_gpu, "gpu_name", lambda: name)
    monkeypatch.setattr(on_gpu, "cases_here", lambda model: cases)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    runs: list[object] = []

    def do_bench(run: Callable[[], object], rep: int, return_mode: str) -> float:
        runs.append(run())
        return 0.5  # ms

    monkeypatch.setattr(on_gpu.triton.testing, "do_bench_cudagraph", do_bench)
    # The interpreter rounds to 8 bits wrongly now and then.
    problems = {case.op: on_gpu._difference(case) for case in cases if "fp8" not in case.op}
    assert not any(problems.values()), problems
    assert not on_gpu.kinds_of_attention(context=70)
    assert not on_gpu.bits_of_products(width=70, inner=130)
    monkeypatch.setattr(sys, "argv", ["on_gpu", "time"])
    assert on_gpu.main() == 0
    compared = sum(on_gpu._has_reference(case) for case in cases)
    assert len(runs) == len(cases) + 2 * compared and compared == len(cases) - 2

    for constant in ("LARGE", "SMALL"):
        monkeypatch.setattr(gpu_steps, constant, SMALLEST)
    for constant, number in (("_CONTEXT", 20), ("_STEPS", 2), ("_WARM_STEPS", 1)):
        monkeypatch.setattr(gpu_steps, constant, number)
    monkeypatch.setattr(gpu_steps, "_BATCHES", (1, 2))
    monkeypatch.setattr(gpu_steps, "_DOCS", tmp_path)
    for kinds in (("int8",), ("", "int8")):  # the second time takes the place of the first
        monkeypatch.setattr(gpu_steps, "_KINDS", kinds)
        gpu_steps.time_steps(name, FakeDevice(), {**CONFIG, "max_total_tokens": 64})
    kept = json.loads((tmp_path / "gpu.json").read_text())
    assert [record["op"] for record in kept["cases"]] == [case.op for case in cases]
    assert all(record["seconds"] == 5e-4 for record in kept["cases"])
    steps = kept["decode_steps"]
    assert (steps["bandwidth"], steps["bandwidth_from"]) == (3.35e12, "published")
    assert [record["weights"] for record in steps["steps"]] == ["", "", "int8", "int8"]
    one, two, narrow, _ = steps["steps"]
    assert one["bytes"] > 2 * narrow["bytes"]
    cached = 2 * 1 * 1 * 64 * 4  # of a position: keys and values, layers, heads, dims, float32
    assert two["bytes"] - one["bytes"] == 21 * cached
    layer = 128 * (2 + 1 + 1 + 2) * 64 + 3 * 128 * 256 + 2 * 128
    weights = (layer + 128 + 256 * 128) * 4
    assert one["bytes"] == weights + 21 * cached  # the embedding is only looked up, the head read
    assert one["ratio"] == pytest.approx(one["seconds"] / one["floor_seconds"])
    page = (tmp_path / "gpu.md").read_text()
    assert page.count("| tiny | decode 3 at 40 | 500.0 |") == len(cases)
    assert page.count("## Decode steps") == 1 and "| int8 | 2 | 20 |" in page


def test_a_bare_checkout_with_torch_and_triton_is_enough() -> None:
    """The GPU's commands import neither stubs, which have to be made, nor packages beside PyTorch's
    own and safetensors."""
    code = """
import importlib.metadata, re, sys
def needs(package, found):
    if package not in found:
        found.add(package)
        for line in importlib.metadata.requires(package) or ():
            if "extra ==" not in line:
                try:
                    needs(re.match(r"[\\w.-]+", line)[0].lower().replace("_", "-"), found)
                except importlib.metadata.PackageNotFoundError:
                    pass
    return found
there = needs("torch", needs("triton", needs("safetensors", {"numpy"})))
class Refuse:
    names = {name for name, packages in importlib.metadata.packages_distributions().items()
             if not any(package.lower().replace("_", "-") in there for package in packages)}
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names - {"headgate"} or "shard_pb2" in name:
            raise ImportError(name)
assert {"grpc", "transformers", "pydantic", "httpx"} <= Refuse.names, Refuse.names
sys.meta_path.insert(0, Refuse())
import headgate.bench.gpu_steps, headgate.kernels.triton.tune
sys.argv[1:] = ["check"]
print(headgate.bench.gpu_steps.main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "no GPU" in done.stdout and done.stdout.splitlines()[-1] == "2"
