"""A real launcher in a process of its own, for end-to-end tests."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).resolve().parents[2]


# Below the ports that systems give to outgoing connections and to whoever asks for any.
_PORTS = range(20000, 32000, 2)


def free_port() -> int:
    """A TCP port whose successor is free too (the launcher's default gRPC port).

    Workers side by side never choose the same ones, and no connection takes one before the server.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    while True:
        port = random.SystemRandom().choice(_PORTS[worker::workers])
        with socket.socket() as first, socket.socket() as second, suppress(OSError):
            first.bind(("127.0.0.1", port))
            second.bind(("127.0.0.1", port + 1))
            return port


class LiveServer:
    """`headgate serve` with the given flags; use as a context manager to stop it."""

    def __init__(
        self,
        *flags: str,
        port: int | None = None,
        env: dict[str, str] | None = None,
        command: Sequence[str] = ("headgate.launcher", "serve"),
    ):
        """`command`: the module that is run, and its words before the flags."""
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.grpc_address = f"127.0.0.1:{self.port + 1}"
        self.lines: list[str] = []
        self._tmp = tempfile.mkdtemp(prefix="headgate-test-")
        # No inherited settings: tests must not depend on the shell. One thread per shard: servers
        # of several workers share the cores.
        inherited = ("PORT", "MODEL_ID", "LOG_LEVEL", "THREADS_PER_SHARD")
        clean = {k: v for k, v in os.environ.items() if k not in inherited}
        self.process = subprocess.Popen(
            [sys.executable, "-m", *command, "--port", str(self.port), *flags],
            cwd=ROOT,
            env={**clean, "THREADS_PER_SHARD": "1", "TMPDIR": self._tmp, **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    # ------------------------------------------------------------------ life

    def wait_ready(self, timeout: float = 120) -> LiveServer:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                self._reader.join(5)
                raise AssertionError(f"launcher ended with {self.process.returncode}:\n{self.log}")
            try:
                if httpx.get(f"{self.url}/health/ready", timeout=5).status_code == 200:
                    return self
            except httpx.HTTPError:
                pass
            time.sleep(0.1)
        self.stop()
        raise AssertionError(f"not ready within {timeout} s:\n{self.log}")

    def wait_exit(self, timeout: float = 60) -> int:
        """Exit code of a launcher that is expected to end by itself."""
        code = self.process.wait(timeout)
        self._reader.join(5)
        return code

    def stop(self, timeout: float = 30) -> int:
        """SIGTERM, then wait; nothing may be left running."""
        family = self.family()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            for process in family:
                _kill(process)
            raise
        self._reader.join(5)
        _, alive = psutil.wait_procs(family, timeout=5)
        for process in alive:
            _kill(process)
        assert not alive, f"left running: {alive}"
        left = list(Path(self._tmp).glob("headgate-*"))
        assert not left, f"left on disk: {left}"
        return code

    def __enter__(self) -> LiveServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # ------------------------------------------------------------ what is there

    @property
    def log(self) -> str:
        return "\n".join(self.lines)

    def family(self) -> list[psutil.Process]:
        try:
            launcher = psutil.Process(self.process.pid)
            return [launcher, *launcher.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def processes(self, module: str) -> list[psutil.Process]:
        """Those of the family that run `python -m module`."""
        found = []
        for process in self.family():
            with suppress(psutil.NoSuchProcess):  # zombies too
                if process.cmdline()[1:3] == ["-m", module]:
                    found.append(process)
        return found

    def shard(self, rank: int) -> psutil.Process:
        """The process of one shard, told apart by its RANK."""
        for process in self.processes("headgate.shard"):
            with suppress(psutil.NoSuchProcess):
                if process.environ().get("RANK") == str(rank):
                    return process
        raise AssertionError(f"no shard {rank} among {self.family()}")

    def metrics(self) -> dict[str, float]:
        """Samples of /metrics: 'name{labels}' -> value."""
        text = httpx.get(f"{self.url}/metrics", timeout=30).text
        samples = {}
        for line in text.splitlines():
            match = re.fullmatch(r"([a-zA-Z_:][\w:]*(?:\{.*\})?) (\S+)", line)
            if match and not line.startswith("#"):
                samples[match[1]] = float(match[2])
        return samples

    def wait_metric(self, name: str, value: float, timeout: float) -> float:
        """Seconds until a metric has a value."""
        start = time.monotonic()
        while (seen := self.metrics().get(name)) != value:
            assert time.monotonic() - start < timeout, f"{name} is {seen}, not {value}"
            time.sleep(0.05)
        return time.monotonic() - start

    # --------------------------------------------------------------- requests

    def post(self, path: str, body: Any, **kwargs: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=120, **kwargs)

    def generate(self, prompt: str, **parameters: Any) -> dict[str, Any]:
        """The answer of /generate with details."""
        body = {"inputs": prompt, "parameters": {"details": True, **parameters}}
        response = self.post("/generate", body)
        assert response.status_code == 200, response.text
        return response.json()

    def token_ids(self, prompt: str, **parameters: Any) -> list[int]:
        return [t["id"] for t in self.generate(prompt, **parameters)["details"]["tokens"]]

    def stream(self, prompt: str, **parameters: Any) -> Iterator[dict[str, Any]]:
        """Events of /generate_stream."""
        body = {"inputs": prompt, "parameters": {"details": True, **parameters}}
        with httpx.stream(
            "POST", f"{self.url}/generate_stream", json=body, timeout=120
        ) as response:
            assert response.status_code == 200, response.read()
            yield from sse_events(response)


def sse_events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """The JSON of each `data:` line; comments and [DONE] left out."""
    for line in response.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line[6:])


def _kill(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        process.kill()


@contextmanager
def launched(*flags: str, **kwargs: Any) -> Iterator[LiveServer]:
    """A ready server that is stopped at the end of the block."""
    with LiveServer(*flags, **kwargs) as server:
        yield server.wait_ready()
