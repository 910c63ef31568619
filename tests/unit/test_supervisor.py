"""The real launcher over stand-ins for its children: restarts, drain, failures, leftovers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.server.live_server import free_port
from tests.unit.launcher_model import write_model

ROOT = Path(__file__).resolve().parents[2]


class Launched:
    """A launcher over stand-ins, in directory `tmp`."""

    def __init__(self, tmp: Path, *flags: str, port: int = 0, **fakes: str) -> None:
        self.port = port or free_port()
        self.notes_file = tmp / "notes"
        self.runs = Path(tempfile.mkdtemp(prefix="runs-"))  # short: sockets are made in it
        model = write_model(tmp / "model")
        self.log_file = tmp / "log"
        own = ("--model-id", str(model), "--port", str(self.port))
        clean = {k: v for k, v in os.environ.items() if k not in ("HOSTNAME", "LOG_LEVEL")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.unit.launcher_with_fakes", *own, *flags],
            cwd=ROOT,
            env={
                **clean,
                "TMPDIR": str(self.runs),
                "FAKE_NOTES": str(self.notes_file),
                **fakes,
            },
            stdout=self.log_file.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def notes(self, role: str, **match: Any) -> list[dict[str, Any]]:
        if not self.notes_file.exists():
            return []
        found = [json.loads(line) for line in self.notes_file.read_text().splitlines()]
        return [n for n in found if n["role"] == role and match.items() <= n.items()]

    def noted(self, role: str, **match: Any) -> list[dict[str, Any]]:
        """As notes, once there are any: a child writes them in its own time."""
        return self.until(lambda: self.notes(role, **match), f"no note of a {role}")

    def until(self, condition: Any, what: str = "") -> Any:
        deadline = time.monotonic() + 30
        while not (found := condition()):
            assert time.monotonic() < deadline, f"{what}\n{self.log}\n{self.notes_file.read_text()}"
            time.sleep(0.02)
        return found

    def ready(self) -> Launched:
        self.until(lambda: "Ready in" in self.log, "not ready")
        return self

    def status(self) -> dict[str, str]:
        (run,) = self.runs.glob("headgate-*")
        return json.loads((run / "status.json").read_text())

    def end(self, *signals: signal.Signals) -> int:
        """Sends signals, waits for the exit code, checks that nothing is left."""
        pids = [n["pid"] for role in ("shard", "router", "gateway") for n in self.notes(role)]
        for number in signals:
            self.process.send_signal(number)
            time.sleep(0.1)
        code = self.process.wait(30)
        assert not [pid for pid in pids if _alive(pid)]
        assert list(self.runs.iterdir()) == []
        return code


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Any]:
    started: list[Launched] = []

    def start(*flags: str, **options: Any) -> Launched:
        started.append(Launched(tmp_path, *flags, **options))
        return started[-1]

    yield start
    for launched in started:
        if launched.process.poll() is None:
            launched.process.kill()
            launched.process.wait()
        shutil.rmtree(launched.runs)


def test_start_and_stop(launch: Any) -> None:
    server = launch("--num-shard", "2", "--gateway-workers", "2").ready()
    shards = server.until(lambda: _pair(server.notes("shard", epoch=1)))
    assert sorted(n["rank"] for n in shards) == [0, 1]
    assert {n["world"] for n in shards} == {"2"} and len({n["port"] for n in shards}) == 1
    server.until(lambda: len(server.notes("gateway")) == 2)
    assert all(n["address"][1] == server.port for n in server.notes("gateway"))
    (run,) = server.runs.glob("headgate-*")
    assert run.stat().st_mode & 0o777 == 0o700
    assert server.status()["phase"] == "ready"
    (group,) = server.noted("router", event="group")
    assert group["addresses"] == [f"unix:{run}/shard-1-{rank}.sock" for rank in range(2)]
    assert f"http://127.0.0.1:{server.port}" in server.log and "Try: curl" in server.log
    server.until(lambda: "shard-1: shard 1 serves" in server.log)
    assert server.end(signal.SIGTERM) == 0
    assert server.noted("router", event="drain") and "Traceback" not in server.log


def test_recovery(launch: Any) -> None:
    """One server through every loss that it survives."""
    server = launch("--num-shard", "2", FAKE_STEPS="1").ready()

    # A shard is killed: the whole group is replaced, on another port.
    first = server.until(lambda: _pair(server.notes("shard", epoch=1)))
    os.kill(first[0]["pid"], signal.SIGKILL)
    second = server.until(lambda: _pair(server.notes("shard", epoch=2)))
    assert not any(_alive(n["pid"]) for n in first)
    assert second[0]["port"] != first[0]["port"]
    (lost,) = server.until(lambda: server.notes("router", event="group_lost"))
    assert lost["epoch"] == 1
    assert lost["reason"] == f"shard-{first[0]['rank']} was killed by SIGKILL"
    server.until(lambda: server.status()["phase"] == "ready" and "Serving again" in server.log)

    # A shard hangs (stopped, so that it would not hear SIGTERM) and the router says so.
    os.kill(second[1]["pid"], signal.SIGSTOP)
    os.kill(server.noted("router")[0]["pid"], signal.SIGUSR1)
    third = server.until(lambda: _pair(server.notes("shard", epoch=3)))
    assert "no heartbeat" in server.noted("router", event="group_lost", epoch=2)[0]["reason"]
    assert not any(_alive(n["pid"]) for n in second)

    # The router dies: the shards stay, and the new one hears of them.
    router = server.noted("router")[0]["pid"]
    os.kill(router, signal.SIGKILL)
    server.until(lambda: len(server.notes("router", event="started")) == 2)
    again = server.until(
        lambda: [n for n in server.notes("router", event="group", epoch=3) if n["pid"] != router]
    )
    assert len(again) == 1 and all(_alive(n["pid"]) for n in third)

    # A gateway dies.
    server.until(lambda: server.notes("gateway"))
    os.kill(server.notes("gateway")[0]["pid"], signal.SIGKILL)
    server.until(lambda: len(server.notes("gateway")) == 2)
    assert server.end(signal.SIGINT) == 0
    assert "Traceback" not in server.log


def _pair(notes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return notes if len(notes) == 2 else []


def test_a_model_error_is_one_sentence_although_peers_crash(launch: Any) -> None:
    fate = '{"1.0": "crash", "1.1": "model error"}'
    server = launch("--num-shard", "2", FAKE_SHARDS=fate, FAKE_NEVER_READY="1")
    assert server.end() == 1
    last = server.log.splitlines()[-1]
    assert last.endswith("launcher: tensor lm_head.weight is missing in model.safetensors.")
    assert len(server.notes("shard")) == 2  # no second try


def test_a_crash_before_ready_shows_the_last_words(launch: Any) -> None:
    server = launch(FAKE_SHARDS='{"1.0": "crash"}', FAKE_NEVER_READY="1")
    assert server.end() == 1
    assert "RuntimeError: boom" in server.log
    assert "shard-0 ended with exit code 1: RuntimeError: boom." in server.log.splitlines()[-1]


def test_a_group_that_keeps_dying(launch: Any) -> None:
    server = launch(FAKE_SHARDS='{"*.0": "die after 0.3"}')
    assert server.end() == 1
    assert {n["epoch"] for n in server.notes("shard")} == {1, 2, 3, 4, 5}
    (failed,) = server.noted("router", event="failed")
    assert "5 times" in failed["message"] and "SIGKILL" in failed["message"]
    assert failed["message"] in server.log.splitlines()[-1]


def test_not_ready_in_time(launch: Any) -> None:
    server = launch("--startup-timeout", "1", FAKE_NEVER_READY="1")
    assert server.end() == 1
    assert "--startup-timeout" in server.log.splitlines()[-1]


def test_a_shard_that_is_suspended_while_it_starts(launch: Any) -> None:
    server = launch("--heartbeat-timeout", "1", FAKE_NEVER_READY="1")
    (shard,) = server.until(lambda: server.notes("shard"))
    os.kill(shard["pid"], signal.SIGSTOP)
    assert server.end() == 1
    assert "shard-0 has been suspended for 1 s" in server.log.splitlines()[-1]


@pytest.mark.parametrize("signals", [(signal.SIGTERM,), (signal.SIGINT, signal.SIGINT)])
def test_a_drain_ends_by_its_limit_or_a_second_signal(launch: Any, signals: Any) -> None:
    limit = "1" if len(signals) == 1 else "60"
    server = launch("--graceful-termination-timeout", limit, FAKE_DRAIN="100").ready()
    started = time.monotonic()
    assert server.end(*signals) == 0
    assert time.monotonic() - started < 15
    assert "unfinished" in server.log


def test_a_drain_waits_for_a_router_that_is_being_restarted(launch: Any) -> None:
    server = launch().ready()
    (router,) = server.noted("router", event="started")
    os.kill(router["pid"], signal.SIGKILL)
    server.until(lambda: "starting it again" in server.log)
    assert server.end(signal.SIGTERM) == 0
    (drain,) = server.noted("router", event="drain")
    assert drain["pid"] != router["pid"] and "unfinished" not in server.log


def test_a_drain_that_cannot_be_finished_says_why(launch: Any) -> None:
    server = launch(FAKE_SHARDS='{"2.0": "model error"}', FAKE_DRAIN="100").ready()
    (shard,) = server.noted("shard")
    server.process.send_signal(signal.SIGTERM)
    server.until(lambda: server.notes("router", event="drain"))
    os.kill(shard["pid"], signal.SIGKILL)
    assert server.end() == 1
    assert "lm_head.weight is missing" in server.log.splitlines()[-1]
    assert "Traceback" not in server.log and "never retrieved" not in server.log


def test_a_stop_while_loading(launch: Any) -> None:
    server = launch(FAKE_NEVER_READY="1")
    server.until(lambda: server.notes("shard"))
    assert server.status()["phase"] == "loading"
    assert server.end(signal.SIGTERM) == 0


@pytest.mark.parametrize(("offset", "flag"), [(0, "--port"), (1, "--grpc-port")])
def test_ports_in_use(launch: Any, offset: int, flag: str) -> None:
    port = free_port()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1" if offset else "0.0.0.0", port + offset))
        taken.listen()
        server = launch(port=port)
        assert server.end() == 1
    assert f"Port {port + offset} is in use" in server.log and flag in server.log
    assert not server.notes_file.exists()


def test_children_die_with_the_launcher(launch: Any) -> None:
    server = launch().ready()
    server.until(lambda: server.notes("gateway") and server.notes("shard"))
    pids = [server.notes(role)[0]["pid"] for role in ("shard", "router", "gateway")]
    server.process.kill()
    server.process.wait()
    server.until(lambda: not any(_alive(pid) for pid in pids))


def test_json_lines_and_socket_prefix(launch: Any, tmp_path: Path) -> None:
    prefix = str(tmp_path / "shards")
    server = launch("--json-output", "--shard-uds-path", prefix).ready()
    (group,) = server.until(lambda: server.notes("router", event="group"))
    assert group["addresses"] == [f"unix:{prefix}-1-0"]
    server.until(lambda: '"shard-0"' in server.log)
    Path(f"{prefix}-1-0").touch()  # what a killed shard leaves behind
    assert server.end(signal.SIGTERM) == 0
    assert not Path(f"{prefix}-1-0").exists()
    records = [json.loads(line) for line in server.log.splitlines()]
    assert {"launcher", "shard-0"} <= {record["process"] for record in records}
    assert all({"time", "level", "message"} <= record.keys() for record in records)
