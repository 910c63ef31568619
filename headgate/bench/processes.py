"""What a server's processes cost, read from /proc: CPU time and memory, by role."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")  # per second
_MODULES = {
    "headgate.router.gateway": "gateway",
    "headgate.router": "router",
    "headgate.shard": "shard",
}


@dataclass(frozen=True, slots=True)
class Usage:
    """Sums over all processes of one role."""

    cpu_seconds: float  # user and system, since they started
    peak_bytes: int  # resident; pages that several share count in each


def family(root: int) -> list[int]:
    """The process `root` and all below it that live."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        fields = _stat(int(folder.name))
        if fields:
            children.setdefault(int(fields[1]), []).append(int(folder.name))
    found, todo = [], [root]
    while todo:
        process = todo.pop()
        found.append(process)
        todo += children.get(process, [])
    return found


def usage(root: int) -> dict[str, Usage]:
    """By role: gateway, router, shard, and "other" for the launcher and what is no Headgate's."""
    found: dict[str, Usage] = {}
    for process in family(root):
        fields = _stat(process)
        if fields is None:
            continue
        role = _role(process)
        before = found.get(role, Usage(0.0, 0))
        found[role] = Usage(
            before.cpu_seconds + (int(fields[11]) + int(fields[12])) / _TICKS,
            before.peak_bytes + _peak(process),
        )
    return found


def cpu_used(before: dict[str, Usage], after: dict[str, Usage]) -> dict[str, float]:
    """Seconds by role between two looks."""
    return {
        role: entry.cpu_seconds - (before[role].cpu_seconds if role in before else 0.0)
        for role, entry in after.items()
    }


def _stat(process: int) -> list[str] | None:
    """/proc/PID/stat from the state on (its third field); None: the process is gone."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None


def _role(process: int) -> str:
    """By the module that it runs with -m."""
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        words = []
    modules = (word for flag, word in pairwise(words) if flag == "-m")
    return _MODULES.get(next(modules, ""), "other")


def _peak(process: int) -> int:
    for key, value in _status(process):
        if key == "VmHWM":
            return int(value.split()[0]) * 1024
    return 0


def _status(process: int) -> Iterator[tuple[str, str]]:
    try:
        text = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return
    for line in text.splitlines():
        key, _, value = line.partition(":")
        yield key, value
