"""docs/migrating.md: every line about TGI says its fate and names a test that exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "migrating.md").read_text()


def rows() -> list[list[str]]:
    table = PAGE.split("| Behaviour of TGI | Here | Test |\n|---|---|---|\n")[1]
    lines = table.split("\n\n")[0].strip().splitlines()
    return [re.split(r" \| ", line.strip("| ")) for line in lines]


def test_every_line_is_kept_fixed_or_dropped() -> None:
    assert len(rows()) > 60
    for cells in rows():
        assert len(cells) == 3, cells
        assert re.match(r"(kept|fixed|dropped)\b", cells[1]), cells


def test_named_metrics_exist() -> None:
    metrics = (ROOT / "docs" / "metrics.md").read_text()
    named = set(re.findall(r"`(tgi_\w+)`", PAGE))
    assert len(named) > 10
    assert all(f"`{name}`" in metrics for name in named)


def test_every_named_test_exists() -> None:
    functions: set[str] = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        tree = ast.parse(path.read_text())
        functions |= {
            f"{path.name}::{node.name}"
            for node in tree.body
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
    named = {cells[2].strip("`") for cells in rows()}
    assert named <= functions, sorted(named - functions)
