"""The real launcher with tests/unit/fake_child.py in place of shard, router and gateway.

`python -m tests.unit.launcher_with_fakes FLAGS`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from headgate.launcher import process, supervisor
from headgate.launcher.cli import text_generation_launcher

FAKE = str(Path(__file__).with_name("fake_child.py"))
ROLES = {
    "headgate.shard": "shard",
    "headgate.router": "router",
    "headgate.router.gateway": "gateway",
}


class FakedChild(process.Child):
    """Starts the stand-in for what it is asked to start."""

    @classmethod
    def spawn(cls, name: str, command: Any, *args: Any, **kwargs: Any) -> process.Child:
        python, _, module, *arguments = command
        if module in ROLES:
            command = [python, "-S", "-E", FAKE, ROLES[module], *arguments]
        return super().spawn(name, command, *args, **kwargs)


if __name__ == "__main__":
    sys.modules["headgate.launcher.spawner"].Child = FakedChild  # type: ignore[attr-defined]
    supervisor.STOP_SECONDS = 2.0
    sys.exit(text_generation_launcher())
