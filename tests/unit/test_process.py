"""Children, the reaper, the restart policy and how lines are rendered."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio

from headgate.launcher.log_output import LogOutput, log_level
from headgate.launcher.process import LAST_WORDS, Child, Exit, Reaper
from headgate.launcher.restart_policy import RestartPolicy, start_limit

ROOT = Path(__file__).resolve().parents[2]


class Nursery:
    """Starts Python snippets as children and keeps what they write."""

    def __init__(self) -> None:
        self.reaper = Reaper()
        self.lines: list[tuple[str, str]] = []

    def spawn(self, code: str, name: str = "child") -> Child:
        command = [sys.executable, "-S", "-E", "-u", "-c", code]
        return Child.spawn(
            name, command, self.reaper, lambda n, line: self.lines.append((n, line)), environment={}
        )


@pytest_asyncio.fixture
async def nursery() -> AsyncIterator[Nursery]:
    nursery = Nursery()
    nursery.reaper.install()
    yield nursery
    for child in nursery.reaper.running:
        child.kill()
        await child.wait()
    nursery.reaper.uninstall()


async def test_output_and_exit(nursery: Nursery) -> None:
    child = nursery.spawn("import sys; print('a'); print('b', file=sys.stderr); sys.exit(3)")
    end = await child.wait()
    assert end == Exit(3) and str(end) == "ended with exit code 3"
    assert nursery.lines == [("child", "a"), ("child", "b")]
    assert list(child.last_words) == ["a", "b"] and not child.running
    assert child.final_sentence(end) == "child ended with exit code 3: b"


async def test_only_the_last_lines_are_kept(nursery: Nursery) -> None:
    child = nursery.spawn("for n in range(100): print(n)\nprint('no end', end='')")
    await child.wait()
    assert len(nursery.lines) == 101 and len(child.last_words) == LAST_WORDS
    assert child.last_words[-1] == "no end"


async def test_the_sentence_of_a_configuration_error(nursery: Nursery) -> None:
    record = json.dumps({"level": "error", "message": "no such tensor", "process": "x"})
    child = nursery.spawn(f"import sys; print({record!r}); print('noise'); sys.exit(2)")
    end = await child.wait()
    assert child.final_sentence(end) == "no such tensor"


async def test_stop_takes_force_where_asking_is_not_enough(nursery: Nursery) -> None:
    polite = nursery.spawn("import time; print('up'); time.sleep(60)")
    deaf = nursery.spawn(
        "import signal, time; signal.signal(15, signal.SIG_IGN); print('up'); time.sleep(60)"
    )
    while len(nursery.lines) < 2:
        await asyncio.sleep(0.01)
    assert (await polite.stop(10)).code == -signal.SIGTERM
    assert str(await deaf.stop(0.2)) == "was killed by SIGKILL"


async def test_grandchildren_end_with_their_parent(nursery: Nursery) -> None:
    child = nursery.spawn(
        "import os, time\nif os.fork() == 0: time.sleep(60)\nprint('up'); time.sleep(60)"
    )
    while not nursery.lines:
        await asyncio.sleep(0.01)
    (grandchild,) = psutil.Process(child.pid).children()
    os.kill(child.pid, signal.SIGKILL)
    await child.wait()
    psutil.wait_procs([grandchild], timeout=5)
    assert not grandchild.is_running() or grandchild.status() == psutil.STATUS_ZOMBIE


def test_as_process_1_it_collects_what_others_leave_behind() -> None:
    """A subreaper gets orphans as process 1 does."""
    code = """
import asyncio, ctypes, os, subprocess, sys, time
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
from headgate.launcher.process import Child, Reaper
async def main():
    reaper = Reaper()
    reaper.install()
    orphan = "import os, time\\nif os.fork() == 0:\\n os.setsid(); time.sleep(0.2)"
    child = Child.spawn("x", [sys.executable, "-S", "-c", orphan], reaper, print, environment={})
    assert (await child.wait()).code == 0
    await asyncio.sleep(0.6)
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        print("nothing left")
asyncio.run(main())
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert ended.stdout.strip() == "nothing left", ended.stderr


def test_delays_double_up_to_a_limit() -> None:
    policy = RestartPolicy(deaths=8)
    delays = [policy.death(served=0) for _ in range(8)]
    assert delays == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, None]
    policy.reset()
    assert policy.death(served=0) == 0.2
    assert policy.death(served=0) == 0.4
    assert policy.death(served=100) == 0.2  # it had long been well


def test_a_start_may_take_as_long_as_the_first_ones_let_expect() -> None:
    assert start_limit(600, slowest=0, deaths=0) == 600
    assert start_limit(600, slowest=2, deaths=1) == 40
    assert start_limit(600, slowest=2, deaths=4) == 320
    assert start_limit(10, slowest=2, deaths=1) == 10


# ----------------------------------------------------------------------- log


def rendered(line: str, **options: Any) -> str:
    out = io.StringIO()
    LogOutput(out=out, err=out, **options).child_line("shard-0", line)
    return out.getvalue()


def test_a_log_that_cannot_take_a_line_is_no_trouble() -> None:
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    LogOutput(out=ascii_only, err=ascii_only).info("été")
    assert b"\\xe9t\\xe9" in ascii_only.buffer.getvalue()  # type: ignore[attr-defined]
    survived = False
    with contextlib.suppress(OSError), open("/dev/full", "w") as full:
        LogOutput(out=full, err=full).info("lost")
        survived = True
    assert survived


RECORD = json.dumps(
    {
        "time": "2026-01-01T00:00:00+00:00",
        "level": "warn",
        "process": "x",
        "message": "slow",
        "tokens": 3,
    }
)


def test_lines_for_people() -> None:
    assert rendered(RECORD).endswith("WARN  shard-0: slow tokens=3\n")
    assert rendered("RuntimeError: boom") == "shard-0 | RuntimeError: boom\n"
    assert rendered("  ") == ""
    assert "\x1b[33mWARN" in rendered(RECORD, colour=True)


@pytest.mark.parametrize("line", [RECORD, "RuntimeError: boom", "{broken", "[1]"])
def test_json_lines(line: str) -> None:
    record = json.loads(rendered(line, json_lines=True))
    assert record["process"] == "shard-0" and {"time", "level", "message"} <= record.keys()


@pytest.mark.parametrize(
    ("text", "level"),
    [("", "info"), ("DEBUG", "debug"), ("warning", "warn"), ("x=trace,error", "error")],
)
def test_log_levels(text: str, level: str) -> None:
    assert log_level({"LOG_LEVEL": text}) == level


def test_the_launcher_keeps_to_its_level() -> None:
    out, err = io.StringIO(), io.StringIO()
    output = LogOutput(level="warn", out=out, err=err)
    output.info("quiet")
    output.block("Sizes", [("a", "b")])
    output.warn("heard")
    output.fatal("the end.")
    assert "heard" in out.getvalue() and "quiet" not in out.getvalue()
    assert "Sizes" not in out.getvalue()
    assert err.getvalue().endswith("ERROR launcher: the end.\n")


def test_a_reader_that_has_gone_stops_nothing() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:
        output = LogOutput(out=stream, err=stream)
        for _ in range(3):
            output.info("x" * 10)
            time.sleep(0)
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
