"""Every environment variable that the code reads is in docs/configuration.md."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("headgate", "kernels", "launcher", "proto", "router", "shard")
# environ.get("X"), environment["X"], getenv("X"), and values["X"] filled from such a name.
READ = re.compile(r"""(?:environ(?:ment)?(?:\.get\(|\[)|getenv\()\s*f?["']([A-Z][A-Z0-9_]+)["']""")
# What every program on the system shares, and what the code only sets for libraries.
COMMON = {"HOME", "PATH", "TMPDIR"}


def variables_read() -> dict[str, str]:
    """Name to the file that reads it."""
    found = {}
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".cpp", ".h") and not path.is_relative_to(ROOT / "headgate"):
                for name in READ.findall(path.read_text()):
                    found[name] = str(path.relative_to(ROOT))
    return found


def test_variables_are_documented() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    found = variables_read()
    assert {"RANK", "HEADGATE_CACHE", "COMPUTE_TYPE"} <= found.keys(), "the search finds nothing"
    missing = {
        name: where
        for name, where in found.items()
        if name not in COMMON and not re.search(rf"`{name}`", page)
    }
    assert not missing
