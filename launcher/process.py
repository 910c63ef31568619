"""Child: one process of the server: spawn it, read what it writes, stop it, know how it ended.

It restarts nothing and knows no roles (supervisor.py does). Works as PID 1 too: Reaper collects
every child the kernel hands over, also those that others left behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

LAST_WORDS = 40  # lines kept of what a process wrote
LONGEST_LINE = 1 << 20  # bytes; a longer one is cut into several
CONFIGURATION_ERROR = 2  # the exit code of a child whose last error is meant for the user
_DRAIN_SECONDS = 1.0  # how long output may go on after the process has ended
_PR_SET_PDEATHSIG = 1

LineSink = Callable[[str, str], None]  # (process name, line)


@dataclass(frozen=True, slots=True)
class Exit:
    """How a process ended."""

    code: int  # as the process gave it; negative: the number of the signal that killed it

    def __str__(self) -> str:
        if self.code >= 0:
            return f"ended with exit code {self.code}"
        try:
            return f"was killed by {signal.Signals(-self.code).name}"
        except ValueError:
            return f"was killed by signal {-self.code}"


class Reaper:
    """Collects ended children. One per process, on the event loop of the main thread."""

    def __init__(self) -> None:
        self._children: dict[int, Child] = {}

    def install(self) -> None:
        """Starts to listen for SIGCHLD."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGCHLD, self.reap)

    def uninstall(self) -> None:
        """Stops listening."""
        asyncio.get_running_loop().remove_signal_handler(signal.SIGCHLD)

    def add(self, pid: int, child: Child) -> None:
        """Has `child` told when `pid` ends."""
        self._children[pid] = child

    @property
    def running(self) -> list[Child]:
        """All children that have not ended."""
        return list(self._children.values())

    def reap(self) -> None:
        """Collects all that have ended. A process' own children end with it."""
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            pid = ended.si_pid
            child = self._children.pop(pid, None)
            if child is not None:  # before the pid can be given to another process
                _signal_group(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            if child is not None:
                child.ended(os.waitstatus_to_exitcode(status))


class Child:
    """A running process of the server. Created by `Child.spawn` on the event loop."""

    def __init__(self, name: str, popen: subprocess.Popen[bytes], on_line: LineSink) -> None:
        self.name = name
        self.pid = popen.pid
        self.started = time.monotonic()
        self.asked_to_stop = False
        self.last_words: deque[str] = deque(maxlen=LAST_WORDS)
        self.last_error = ""  # message of the last record at level error
        self._popen = popen
        self._on_line = on_line
        self._rest = b""
        loop = asyncio.get_running_loop()
        self._exit: asyncio.Future[int] = loop.create_future()
        self._silent: asyncio.Future[None] = loop.create_future()
        assert popen.stdout is not None
        self._pipe = popen.stdout
        os.set_blocking(self._pipe.fileno(), False)
        loop.add_reader(self._pipe.fileno(), self._read)

    @classmethod
    def spawn(
        cls,
        name: str,
        command: Sequence[str],
        reaper: Reaper,
        on_line: LineSink,
        *,
        environment: Mapping[str, str],
        pass_fds: Sequence[int] = (),
    ) -> Child:
        """Starts `command` in a session of its own; it dies with this process. Raises OSError."""
        popen = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=pass_fds,
            start_new_session=True,
            preexec_fn=_die_with_parent(os.getpid()),
        )
        child = cls(name, popen, on_line)
        reaper.add(popen.pid, child)
        return child

    @property
    def running(self) -> bool:
        """Whether the process has not ended yet."""
        return not self._exit.done()

    @property
    def suspended(self) -> bool:
        """Whether a signal (SIGSTOP) keeps the process from running."""
        try:
            with open(f"/proc/{self.pid}/stat", "rb") as file:
                return file.read().rpartition(b")")[2].split()[0] == b"T"
        except OSError:
            return False  # it has ended, or this system tells otherwise

    async def wait(self) -> Exit:
        """Waits for the end of the process and of what it wrote."""
        code = await asyncio.shield(self._exit)
        await asyncio.wait([self._silent], timeout=_DRAIN_SECONDS)
        self._close()
        return Exit(code)

    def terminate(self) -> None:
        """Asks the process to stop (SIGTERM)."""
        self.asked_to_stop = True
        if self.running:
            _signal_group(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """Ends the process at once, even a stopped one (SIGKILL)."""
        self.asked_to_stop = True
        if self.running:
            _signal_group(self.pid, signal.SIGKILL)

    async def stop(self, patience: float) -> Exit:
        """SIGTERM, then SIGKILL after `patience` seconds."""
        self.terminate()
        await asyncio.wait([self._exit], timeout=patience)
        self.kill()
        return await self.wait()

    def final_sentence(self, end: Exit) -> str:
        """Why it ended, for the user: its own sentence, or how it ended and its last line."""
        if end.code == CONFIGURATION_ERROR and self.last_error:
            return self.last_error
        last = self.last_error or (self.last_words[-1].strip() if self.last_words else "")
        return f"{self.name} {end}" + (f": {last}" if last else "")

    def ended(self, code: int) -> None:
        """Called by the Reaper."""
        self._popen.returncode = code  # so that Popen never waits for a pid that is not ours
        if not self._exit.done():
            self._exit.set_result(code)

    def _read(self) -> None:
        try:
            data = os.read(self._pipe.fileno(), 1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._close()
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > LONGEST_LINE:
            lines.append(self._rest)
            self._rest = b""
        for line in lines:
            self._take(line)

    def _take(self, raw: bytes) -> None:
        line = raw.decode("utf-8", "replace").rstrip("\r")
        message = line
        if line.startswith("{"):
            try:
                record = json.loads(line)
                message = str(record["message"])
                if record["level"] == "error":
                    self.last_error = message
                if record.get("traceback"):
                    message += "\n" + record["traceback"]
            except (ValueError, KeyError, TypeError):
                pass
        if message.strip():
            self.last_words.append(message)
        self._on_line(self.name, line)

    def _close(self) -> None:
        if self._silent.done():
            return
        if self._rest:
            self._take(self._rest)
            self._rest = b""
        asyncio.get_running_loop().remove_reader(self._pipe.fileno())
        self._pipe.close()
        self._silent.set_result(None)


def _signal_group(pid: int, number: signal.Signals) -> None:
    """Each child leads a process group of its own, so its own children get the signal too."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def _die_with_parent(parent: int) -> Callable[[], None] | None:
    """What a child does between fork and exec: ask the kernel to be killed with its parent."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)

    return ask
