"""The gateway as the launcher starts it: a process on an inherited socket."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from headgate.router.gateway.config import GatewayConfig


def start(tmp_path: Path, *, listener: socket.socket, index: int = 0) -> subprocess.Popen[bytes]:
    config = tmp_path / "gateway.json"
    config.write_text(json.dumps({"router_address": f"unix:{tmp_path}/none.sock"}))
    command = [sys.executable, "-m", "headgate.router.gateway"]
    command += ["--config", str(config), "--fd", str(listener.fileno())]
    return subprocess.Popen(
        command,
        pass_fds=[listener.fileno()],
        stderr=subprocess.PIPE,
        env={**os.environ, "HEADGATE_GATEWAY_INDEX": str(index)},
        cwd=Path(__file__).parents[2],
    )


def test_two_processes_share_a_socket_and_stop_when_asked(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        processes = [start(tmp_path, listener=listener, index=index) for index in (0, 1)]
        try:
            for _ in range(20):
                assert httpx.get(f"{url}/health/live", timeout=30).status_code == 200
            response = httpx.get(f"{url}/health/ready", timeout=30)
            assert response.json()["state"] == "loading"
            began = time.monotonic()
            for process in processes:
                process.send_signal(signal.SIGTERM)
            for process in processes:
                _, errors = process.communicate(timeout=20)
                assert process.returncode == 0, errors.decode()
                assert b"Traceback" not in errors
            assert time.monotonic() - began < 15
        finally:
            for process in processes:
                process.kill()
                process.wait()


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ('{"router_adress": "x"}', "router_adress"),
        ('{"router_address": "unix:x", "api_key": "cl\u00e9"}', "--api-key may hold"),
    ],
)
def test_a_bad_configuration_ends_with_code_2(tmp_path: Path, config: str, told: str) -> None:
    path = tmp_path / "gateway.json"
    path.write_text(config, encoding="utf-8")
    command = [sys.executable, "-m", "headgate.router.gateway", "--config", str(path), "--fd", "0"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, cwd=root, timeout=60, check=False)
    assert done.returncode == 2
    line = json.loads(done.stderr.decode().splitlines()[-1])
    assert line["level"] == "error" and told in line["message"]
    assert line["process"] == "gateway-0"


def test_neither_torch_nor_transformers_is_imported() -> None:
    code = (
        "import sys, headgate.router.gateway.__main__;"
        "bad = {'torch', 'transformers', 'numpy'} & set(sys.modules); assert not bad, bad"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, timeout=60)


def test_defaults_are_tgis() -> None:
    config = GatewayConfig(router_address="unix:x")
    assert (config.payload_limit, config.max_client_batch_size) == (2_000_000, 4)
    assert config.keep_alive_seconds == 15
