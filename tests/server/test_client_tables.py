"""Tables of clients' features against the embedded model: a row each.

`text-generation`, `litellm` and `langchain-openai` have an environment of their own, which
`make test` makes, for their old or heavy pins.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.server.live_server import ROOT, LiveServer

ROWS = Path(__file__).parent / "client_rows"
CLIENTS_PYTHON = Path(os.environ.get("CLIENTS_VENV", ROOT / ".venv-clients")) / "bin/python"
INTERPRETERS = {
    "openai_rows": Path(sys.executable),
    "vllm_rows": Path(sys.executable),
    "huggingface_rows": Path(sys.executable),
    "text_generation_rows": CLIENTS_PYTHON,
    "langchain_rows": CLIENTS_PYTHON,
    "litellm_rows": CLIENTS_PYTHON,
}


def rows_of(module: str) -> list[str]:
    tree = ast.parse((ROWS / f"{module}.py").read_text())
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    return [name for name in functions if name.startswith("row_")]


@cache
def outcomes(module: str, url: str) -> dict[str, str]:
    """Row to what went wrong; all rows of a client in one process, since imports take seconds."""
    python = INTERPRETERS[module]
    if not python.exists():
        pytest.fail(f"{python} is missing: `make test` makes it")
    done = subprocess.run(
        [python, ROWS / "runner.py", ROWS / f"{module}.py", url],
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LANGSMITH_TRACING": "false"},
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    ("module", "row"), [(module, row) for module in INTERPRETERS for row in rows_of(module)]
)
def test_row(server: LiveServer, module: str, row: str) -> None:
    problem = outcomes(module, server.url)[row]
    assert not problem, problem
