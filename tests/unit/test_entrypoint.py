"""The image's entry point: what it hands to the launcher, and SageMaker's way to start it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "deploy" / "entrypoint.sh"


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Commands that stand in for the launcher, and for the user's being an ordinary one."""
    for name, text in (("text-generation-launcher", 'echo "$@"'), ("id", "echo 1000")):
        command = tmp_path / name
        command.write_text(f"#!/bin/sh\n{text}\n")
        command.chmod(0o755)
    return f"{tmp_path}:{os.environ['PATH']}"


def launched(path: str, *words: str, **environment: str) -> str:
    done = subprocess.run(
        ["sh", SCRIPT, *words],
        env={"PATH": path, "HOME": "/tmp", **environment},
        capture_output=True,
        text=True,
        timeout=10,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_flags_are_handed_on(path: str) -> None:
    assert launched(path, "--model-id", "M", "--port", "81") == "--model-id M --port 81"
    assert launched(path) == ""


def test_sagemaker_says_serve_and_asks_on_its_port(path: str) -> None:
    assert launched(path, "serve") == "--port 8080"
    assert launched(path, "serve", SAGEMAKER_BIND_TO_PORT="9000") == "--port 9000"
    assert launched(path, "serve", PORT="80") == "--port 8080"
