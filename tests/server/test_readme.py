"""The README's first command and its curl lines, run as they stand; Ctrl-C stops everything.

`make test`, its second command, is what runs this.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time

import httpx
import psutil

from tests.server.live_server import ROOT, free_port

README = (ROOT / "README.md").read_text()


def shell_blocks() -> list[str]:
    return re.findall(r"```sh\n(.*?)```", README, re.DOTALL)


def test_the_commands_of_the_readme() -> None:
    blocks = shell_blocks()
    assert [block.strip() for block in blocks if block.startswith("make")] == [
        "make serve",
        "make test",
    ]
    port = free_port()
    environment = {k: v for k, v in os.environ.items() if k not in ("PORT", "MAKEFLAGS")}
    server = subprocess.Popen(
        ["make", "serve", f"PORT={port}"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        started = time.monotonic()
        while not _ready(port):
            assert server.poll() is None, server.communicate()[0]
            assert time.monotonic() - started < 120
            time.sleep(0.1)
        for block in blocks:
            if block.startswith("curl"):
                command = block.replace(":3000", f":{port}")
                done = subprocess.run(
                    command, shell=True, capture_output=True, text=True, timeout=60, check=True
                )
                assert "Tokyo" in done.stdout.replace('","', ""), done.stdout
    finally:
        family = [*psutil.Process(server.pid).children(recursive=True), psutil.Process(server.pid)]
        os.killpg(server.pid, signal.SIGINT)  # what Ctrl-C does: the whole foreground group
        output = server.communicate(timeout=30)[0]
    _, alive = psutil.wait_procs(family, timeout=5)
    assert not alive
    assert "curl" in output, "no line to try"


def _ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health/ready", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False
