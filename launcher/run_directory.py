"""The private directory of one launch: sockets, the children's configuration, the status file."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headgate.launcher.errors import LaunchError

LONGEST_SOCKET_PATH = 100  # bytes; the kernel takes 107
PHASES = ("downloading", "loading", "ready", "recovering", "draining", "failed")


class RunDirectory:
    """Mode 0700, unlike any other launch's, removed at the end."""

    def __init__(self, made: Path | None = None) -> None:
        """`made`: one that another process has made for this launch."""
        if made is not None:
            self.path = made
            return
        path = tempfile.mkdtemp(prefix="headgate-")
        if len(os.fsencode(path)) + len("/shard-1000000-100.sock") > LONGEST_SOCKET_PATH:
            os.rmdir(path)  # TMPDIR is too deep for a socket's name
            path = tempfile.mkdtemp(prefix="headgate-", dir="/tmp")
        self.path = Path(path)

    @property
    def control_socket(self) -> Path:
        """Where the launcher listens for the router."""
        return self.path / "control.sock"

    @property
    def router_socket(self) -> Path:
        """Where the router listens for gateways."""
        return self.path / "router.sock"

    @property
    def status_file(self) -> Path:
        """What gateways read until they reach the router."""
        return self.path / "status.json"

    def shard_address(self, prefix: str, rank: int) -> str:
        """A shard's socket; "{epoch}" stands for the epoch, also in the name of the file.

        `prefix`: what --shard-uds-path says; its directory is made. Raises LaunchError.
        """
        start = prefix or str(self.path / "shard")
        if prefix:
            try:
                Path(prefix).absolute().parent.mkdir(0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise LaunchError(
                    f"The directory of --shard-uds-path {prefix} cannot be made: {error.strerror}."
                ) from None
        return f"unix:{os.path.abspath(start)}-{{epoch}}-{rank}" + ("" if prefix else ".sock")

    def write_config(self, name: str, values: Mapping[str, Any]) -> Path:
        """A child's configuration file, readable by this user only (it may hold the API key)."""
        path = self.path / f"{name}.json"
        _write_atomically(path, values)
        return path

    def write_status(self, phase: str, detail: str = "") -> None:
        """Replaces the status file."""
        assert phase in PHASES, phase
        _write_atomically(self.status_file, {"phase": phase, "detail": detail})

    def remove(self) -> None:
        """Removes all of it."""
        shutil.rmtree(self.path, ignore_errors=True)


def _write_atomically(path: Path, values: Mapping[str, Any]) -> None:
    draft = path.with_suffix(".new")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "w") as stream:
        json.dump(values, stream, ensure_ascii=False, indent=1)
    os.replace(draft, path)
