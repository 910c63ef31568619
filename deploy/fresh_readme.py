"""Part of test_fresh.sh: runs the README's `sh` blocks as a person would, on a fresh clone.

The block with `make serve` runs until the end of the blocks that ask it something; then Ctrl-C, a
second start against the clock, and the rest. The standard library only.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

URL = "http://127.0.0.1:3000/health/ready"
FIRST_START, SECOND_START = 1500, 20  # seconds


def start(block: str, limit: float) -> tuple[subprocess.Popen[bytes], float]:
    """Runs a block in a session of its own until the server is ready; and how long that took."""
    began = time.monotonic()
    server = subprocess.Popen(["sh", "-c", block], start_new_session=True)
    while True:
        took = time.monotonic() - began
        assert server.poll() is None, f"{block!r} ended with {server.returncode}"
        assert took < limit, f"not ready within {limit} s"
        try:
            urllib.request.urlopen(URL, timeout=5).close()
            return server, took
        except OSError:
            time.sleep(0.2)


def interrupt(server: subprocess.Popen[bytes]) -> None:
    """Ctrl-C: SIGINT to every process of the terminal's foreground group."""
    os.killpg(server.pid, signal.SIGINT)
    server.wait(60)
    left = subprocess.run(["pgrep", "-a", "-f", "headgate"], capture_output=True, text=True).stdout
    left = "\n".join(line for line in left.splitlines() if "fresh_readme" not in line)
    assert not left, f"left running after Ctrl-C:\n{left}"
    assert not list(Path("/tmp").glob("headgate-*")), "left in /tmp after Ctrl-C"


def main() -> int:
    blocks = re.findall(r"^```sh\n(.*?)^```", Path("README.md").read_text(), re.M | re.S)
    serve = next(block for block in blocks if "make serve" in block)
    questions = [block for block in blocks if block.startswith("curl")]
    tests = next(block for block in blocks if "make test" in block)
    assert len(questions) >= 2 and len(blocks) == len(questions) + 2, blocks

    server, took = start(serve, FIRST_START)
    print(f"make serve: ready after {took:.0f} s")
    for question in questions:
        print("$ " + question.strip())
        answer = subprocess.run(["sh", "-c", question], capture_output=True, text=True, timeout=120)
        print(answer.stdout)
        assert answer.returncode == 0 and "Tokyo" in answer.stdout, answer.stderr
    interrupt(server)

    server, took = start(serve, SECOND_START)
    print(f"make serve again: ready after {took:.1f} s")
    interrupt(server)

    if not os.environ.get("FRESH_SKIP_TESTS"):
        subprocess.run(["sh", "-c", tests], check=True)
    print("readme: its commands work on a fresh machine")
    return 0


if __name__ == "__main__":
    sys.exit(main())
