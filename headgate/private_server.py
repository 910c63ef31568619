"""A server that belongs to this program: started as a child, reached over a unix socket, no ports.

It ends with the program, however that ends. Requests are its users' (llm.py, batch.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence

from headgate.launcher.process import Exit
from headgate.launcher.run_directory import RunDirectory

_LOOK_SECONDS = 0.02  # between two looks at the status file
_STOP_SECONDS = 15.0  # between SIGTERM and SIGKILL
_LAST_WORDS = 4000  # characters of what the launcher said at its end
_WRONG_USAGE = 2  # the launcher's exit code for a flag that it doesn't have
_STDERR = 2  # the log goes there, also where sys.stderr is no file


class ServerError(RuntimeError):
    """The server cannot start, or ended by itself; the message is its own last sentence."""


class PrivateServer:
    """`headgate serve` without ports. Close it, or use it in a `with`."""

    def __init__(self, flags: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """`flags`: of `headgate serve`; `environment`: set for the server alone."""
        self._run = RunDirectory()
        self.address = f"unix:{self._run.router_socket}"  # of the router's gRPC service
        self.status_path = str(self._run.status_file)
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "headgate.launcher.private"),
                *("--run-directory", str(self._run.path), "--parent", str(os.getpid())),
                *("--graceful-termination-timeout=0", *flags),
            ],
            # Only what goes wrong is worth a line among the program's own.
            env={"LOG_LEVEL": "warn", **os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=_STDERR,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is the program's to handle
        )
        self._words: list[str] = []
        self._reader = threading.Thread(
            target=_read, args=(self._process, self._words), name="headgate-launcher", daemon=True
        )
        self._reader.start()
        self._finalizer = weakref.finalize(self, _stop, self._process, self._run, os.getpid())

    def wait_ready(self) -> None:
        """Raises ServerError with the launcher's own sentence if it cannot start."""
        told = ""
        while True:
            self.check()
            phase, detail = self._status()
            if phase == "ready":
                return
            if phase == "downloading" and detail != told:
                print(f"headgate: {detail}", file=sys.stderr, flush=True)
                told = detail
            time.sleep(_LOOK_SECONDS)

    def check(self) -> None:
        """Raises ServerError if the server has ended."""
        if not self._finalizer.alive:
            raise ServerError("The server has been closed.")
        if self._process.poll() is not None:
            self._reader.join(1)
            words = "".join(self._words)[-_LAST_WORDS:].strip()
            if self._process.returncode == _WRONG_USAGE:
                words = words.rpartition("\n")[2]  # what comes before lists all flags
            raise ServerError(words or f"The server {Exit(self._process.returncode)}.")

    def close(self) -> None:
        """Ends all of it; nothing of it is left when this returns."""
        self._finalizer()

    def __enter__(self) -> PrivateServer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _status(self) -> tuple[str, str]:
        try:
            with open(self.status_path) as stream:
                status = json.load(stream)
        except (OSError, ValueError):
            return "", ""
        return str(status.get("phase")), str(status.get("detail"))


def _read(process: subprocess.Popen[bytes], words: list[str]) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        words.append(line.decode("utf-8", "replace"))


def _stop(process: subprocess.Popen[bytes], run: RunDirectory, owner: int) -> None:
    if os.getpid() != owner:
        return  # a forked copy of the program ends, not the program
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()  # its children are killed by the kernel
        process.wait()
    run.remove()
