"""Starts the processes of a shard group that meet on a free port of this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
TIMEOUT = 120  # seconds


def outputs_of(module: str, world_size: int, **environment_of_all: str) -> list[str]:
    """What `python -m module` printed as each rank, once all have ended."""
    environment = {
        **os.environ,
        **environment_of_all,
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    members = [
        subprocess.Popen(
            [sys.executable, "-m", module],
            cwd=REPOSITORY,
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        return [member.communicate(timeout=TIMEOUT)[0] for member in members]
    finally:
        for member in members:
            member.kill()


def free_port() -> int:
    """A TCP port of the loopback interface that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
