"""What `make test-gpu` and `make bench-gpu` do with whole steps, on a device that is not there."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("triton")

from headgate.bench import gpu_steps
from tests.unit.fake_device import FakeDevice, Waits

CONFIG = {"device": "cpu", "dtype": "float32", "kv_cache_dtype": "float32", "num_blocks": 64}


@contextmanager
def never_waiting() -> Iterator[None]:
    with Waits() as waits:
        yield
    assert not waits.found


def test_steps_are_checked_and_timed(
    unwatched_triton: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = gpu_steps.make_rows(2, 20, 4)
    assert gpu_steps.check(FakeDevice(), CONFIG, never_waiting, rows) == []
    assert capsys.readouterr().out.count("ok      tokens of steps") == 4

    runner = gpu_steps.make_runner(gpu_steps.TINY, FakeDevice(), CONFIG)
    runner.allocate(64)
    (record,) = gpu_steps.measure(runner, [2], 20, bandwidth=1e9, steps=6)
    model = runner.model
    table = 512 * 256 * 4  # only looked up; the head, as large, is read
    cached = 2 * 23 * runner.kv_layout.bytes_per_block / 16
    assert record["bytes"] == model.weight_bytes - table + cached
    assert record["ratio"] == pytest.approx(record["seconds"] / record["floor_seconds"])
    bandwidth, source = gpu_steps.bandwidth_of("NVIDIA H100 80GB HBM3", "cpu")
    assert (bandwidth, source) == (3.35e12, "published")

    (tmp_path / "gpu.json").write_text(json.dumps({"gpu": "H100", "cases": []}))
    content = {"gpu": "H100", "model": "tiny", "bandwidth": bandwidth, "bandwidth_from": source}
    for _ in range(2):  # the second time takes the place of the first
        gpu_steps.write({**content, "steps": [record]}, tmp_path)
    kept = json.loads((tmp_path / "gpu.json").read_text())
    assert kept["cases"] == [] and kept["decode_steps"]["steps"] == [record]
    page = (tmp_path / "gpu.md").read_text()
    assert page.count("## Decode steps") == 1 and "| 2 | 20 |" in page


def test_a_bare_checkout_with_torch_and_triton_is_enough() -> None:
    """The GPU's commands import neither stubs, which have to be made, nor other packages."""
    code = """
import sys, types
class Refuse:
    names = {"google", "grpc", "tokenizers", "transformers", "llguidance", "fastapi", "uvicorn",
             "pydantic", "httpx", "psutil", "prometheus_client", "jinja2"}
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names or name.startswith("headgate.proto.shard_pb2"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import headgate.bench.gpu_steps, headgate.kernels.triton.tune
sys.argv[1:] = ["check"]
print(headgate.bench.gpu_steps.main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "no GPU" in done.stdout and done.stdout.splitlines()[-1] == "2"
