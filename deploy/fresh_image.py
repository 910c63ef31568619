"""Part of test_fresh.sh: starts the image's entry point without a network and asks it something.

Runs as root inside the installed root, in process and network namespaces of its own; the entry
point becomes process 1 of another, as in a container. The standard library only.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ENTRY_POINT = "/opt/headgate/deploy/entrypoint.sh"
URL = "http://127.0.0.1:80"
QUESTION = {
    "messages": [{"role": "user", "content": "What is the capital of Japan?"}],
    "temperature": 0,
    "max_tokens": 20,
}


def raise_loopback() -> None:
    """`ip link set lo up`, which a bare root has no program for."""
    set_flags, up = 0x8914, 1
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, set_flags, struct.pack("16sh", b"lo", up))


def fetch(path: str, body: object = None) -> bytes:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(URL + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return bytes(answer.read())


def wait_ready(server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 180
    while True:
        assert server.poll() is None, f"the server ended with {server.returncode}"
        assert time.monotonic() < deadline, "not ready within 180 s"
        try:
            fetch("/health/ready")
            return
        except OSError:
            time.sleep(0.2)


def processes(without: set[int]) -> dict[int, int]:
    """Process number -> user."""
    found = {int(p.name): p.stat().st_uid for p in Path("/proc").iterdir() if p.name.isdigit()}
    return {number: user for number, user in found.items() if number not in without}


def main() -> int:
    raise_loopback()
    subprocess.run(["mount", "-t", "proc", "proc", "/proc"], check=True)
    unshare = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    server = subprocess.Popen([*unshare, ENTRY_POINT, "--num-shard", "2"])
    ours = {os.getpid(), os.getppid(), server.pid}
    wait_ready(server)
    text = json.loads(fetch("/v1/chat/completions", QUESTION))["choices"][0]["message"]["content"]
    print(f"answer: {text}")
    assert "Tokyo" in text
    users = set(processes(without=ours).values())
    assert users == {1000}, f"users of the server's processes: {users}"
    assert Path("/data").stat().st_uid == 1000
    launcher = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text()
    os.kill(int(launcher), signal.SIGTERM)
    code = server.wait(60)
    assert code == 0, f"exit code {code} after SIGTERM"
    left = processes(without=ours)
    assert not left, f"left running: {left}"
    print("image: answers on port 80 with no network, not as root, and stops clean")
    return 0


if __name__ == "__main__":
    sys.exit(main())
