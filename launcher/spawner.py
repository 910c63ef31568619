"""How each kind of child is started: its command line, environment and name. It watches none."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from headgate.launcher.child_configs import child_environment, shard_environment
from headgate.launcher.config import LauncherConfig
from headgate.launcher.process import Child, LineSink, Reaper


class Spawner:
    """Starts children that report to `reaper` and `on_line`."""

    def __init__(self, config: LauncherConfig, reaper: Reaper, on_line: LineSink) -> None:
        self._config = config
        self._reaper = reaper
        self._on_line = on_line

    def model(self, source: Path, result: Path) -> Child:
        """The process that downloads and converts."""
        arguments = ("--source", str(source), "--result", str(result))
        return self._spawn("model", "headgate.launcher.prepare_model", arguments)

    def gateway(self, index: int, config: Path, listener: int) -> Child:
        """A gateway that accepts from the file descriptor `listener`."""
        return self._spawn(
            f"gateway-{index}",
            "headgate.router.gateway",
            ("--config", str(config), "--fd", str(listener)),
            {"HEADGATE_GATEWAY_INDEX": str(index)},
            pass_fds=(listener,),
        )

    def router(self, config: Path) -> Child:
        """The router."""
        return self._spawn("router", "headgate.router", ("--config", str(config)))

    def shard(
        self, config: Path, rank: int, world_size: int, epoch: int, master: tuple[str, int]
    ) -> Child:
        """One shard of a group that meets at `master`, address and port."""
        own = shard_environment(rank, world_size, epoch, master)
        return self._spawn(f"shard-{rank}", "headgate.shard", ("--config", str(config)), own)

    def _spawn(
        self,
        name: str,
        module: str,
        arguments: tuple[str, ...],
        own: dict[str, str] | None = None,
        pass_fds: tuple[int, ...] = (),
    ) -> Child:
        return Child.spawn(
            name,
            [sys.executable, "-m", module, *arguments],
            self._reaper,
            self._on_line,
            environment=child_environment(os.environ, self._config, **(own or {})),
            pass_fds=pass_fds,
        )
