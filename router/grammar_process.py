"""The worker process that compiles grammars, from the router's side. Blocks: for a thread's use."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import socket
import subprocess
import sys
from typing import BinaryIO

logger = logging.getLogger(__name__)

START_SECONDS = 60.0  # to load a vocabulary, on a busy machine
_COMMAND = (sys.executable, "-m", "headgate.router.grammar_worker")  # and its settings


# How a process ends that brings itself down: a stack that is full, memory that is not given.
_OWN_FAULTS = (signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV)
_END_SECONDS = 5.0  # for a worker that has closed its end to be gone


class WorkerLost(Exception):
    """There is no worker, or somebody ended it: nothing is known of the grammar."""


class WorkerCrashed(Exception):
    """The grammar brought the worker down."""


class GrammarProcess:
    """One worker at a time, started when it is needed. See grammar_worker.py for what is said."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._answers: BinaryIO | None = None

    def ask(self, message: bytes, settings: dict[str, object], timeout: float) -> dict[str, str]:
        """The worker's answer to a serialised Grammar; `settings` are a new worker's.

        Raises WorkerLost, WorkerCrashed, and TimeoutError after `timeout` seconds. The worker is
        gone then, and the next call starts another.
        """
        if self._process is None or self._process.poll() is not None:
            self._start(settings)
        try:
            assert self._socket is not None and self._answers is not None
            self._socket.settimeout(timeout)
            self._socket.sendall(len(message).to_bytes(4, "little") + message)
            line = self._answers.readline()
        except TimeoutError:
            self.stop()
            raise
        except OSError:
            line = b""
        if not line.endswith(b"\n"):
            crash = self._crash()
            self.stop()
            raise WorkerCrashed(crash) if crash else WorkerLost("somebody ended it")
        return json.loads(line)

    def _crash(self) -> str:
        """How the worker that has gone silent ended, where that was its own doing; else empty."""
        process = self._process
        if process is None:  # stop() in another thread
            return ""
        try:
            code = process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            return "it closed its output"
        if code >= 0:
            return f"it ended with exit code {code}"
        return f"it ended with signal {-code}" if -code in _OWN_FAULTS else ""

    def stop(self) -> None:
        """Ends the worker. May be called from another thread, which then loses it."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
        for end in (self._answers, self._socket):
            if end is not None:
                with contextlib.suppress(OSError):
                    end.close()
        self._answers = self._socket = None

    def _start(self, settings: dict[str, object]) -> None:
        self.stop()
        ours, theirs = socket.socketpair()
        # Popen starts it without forking this process, whose other threads are gRPC's.
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [*_COMMAND, json.dumps(settings)],
                    stdin=theirs.fileno(),
                    stdout=theirs.fileno(),
                    start_new_session=True,  # a terminal's Ctrl-C is the launcher's to handle
                )
            except OSError as error:
                ours.close()
                raise WorkerLost(f"it cannot be started: {error}") from error
        self._socket, self._answers = ours, ours.makefile("rb")
        ours.settimeout(START_SECONDS)
        try:
            started = bool(self._answers.readline())
        except OSError:
            started = False
        if not started:
            self.stop()
            raise WorkerLost("it does not start")
        logger.info("grammars are compiled", extra={"fields": {"pid": self._process.pid}})
