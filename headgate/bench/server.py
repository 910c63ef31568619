"""Starts a server as a command, waits until it answers, stops it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO

_POLL = 0.02  # seconds
_STOP_SECONDS = 30.0


class ServerFailed(RuntimeError):
    """The server ended, or did not become ready; with its last words."""


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server that answers."""

    pid: int  # of the process that was started
    url: str
    ready_seconds: float  # from the start of its process to the first 200


def free_port() -> int:
    """A TCP port whose successor is free too: Headgate's gRPC port."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            try:
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


@contextlib.contextmanager
def running(
    command: Sequence[str], url: str, health: str = "/health", timeout: float = 600.0
) -> Iterator[RunningServer]:
    """Runs `command` until the block ends. Raises ServerFailed."""
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while not _answers(url + health):
                if process.poll() is not None:
                    raise ServerFailed(
                        f"{command[0]} ended with {process.returncode}:\n{_tail(log)}"
                    )
                if time.monotonic() - started > timeout:
                    raise ServerFailed(f"not ready within {timeout:g} s:\n{_tail(log)}")
                time.sleep(_POLL)
            yield RunningServer(process.pid, url, time.monotonic() - started)
            _check(process, log)
        finally:
            _stop(process)


def _check(process: subprocess.Popen[bytes], log: IO[str]) -> None:
    if process.poll() is not None:
        raise ServerFailed(f"the server ended with {process.returncode}:\n{_tail(log)}")


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as response:
            return bool(response.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, later SIGKILL, to the server and all that it started."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _tail(log: IO[str]) -> str:
    log.seek(0)
    return "".join(log.readlines()[-15:])
