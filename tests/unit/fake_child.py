"""A stand-in for any child of the launcher: `fake_child.py ROLE` plus the child's own arguments.

It notes what happens to it in the file $FAKE_NOTES, one JSON object a line, and misbehaves as the
variables FAKE_* say. Standard library only: it starts in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import time
from typing import Any


def note(**fields: Any) -> None:
    line = json.dumps({"role": ROLE, "pid": os.getpid(), **fields}) + "\n"
    descriptor = os.open(os.environ["FAKE_NOTES"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, line.encode())
    os.close(descriptor)


def log(level: str, message: str) -> None:
    record = {"time": "2026-01-01T00:00:00+00:00", "level": level, "process": ROLE}
    print(json.dumps({**record, "message": message}), file=sys.stderr, flush=True)


def sleep_for_ever() -> None:
    while True:
        time.sleep(60)


def shard(config: dict[str, Any]) -> None:
    rank, epoch = int(os.environ["RANK"]), int(os.environ["HEADGATE_EPOCH"])
    note(rank=rank, epoch=epoch, port=os.environ["MASTER_PORT"], world=os.environ["WORLD_SIZE"])
    fate = json.loads(os.environ.get("FAKE_SHARDS", "{}"))
    act = fate.get(f"{epoch}.{rank}") or fate.get(f"*.{rank}", "")
    if act == "model error":
        time.sleep(0.2)
        log("error", "tensor lm_head.weight is missing in model.safetensors")
        sys.exit(2)
    if act == "crash":
        print("Traceback (most recent call last):\nRuntimeError: boom", file=sys.stderr)
        sys.exit(1)
    if act.startswith("die after "):
        time.sleep(float(act.removeprefix("die after ")))
        os.kill(os.getpid(), signal.SIGKILL)
    log("info", f"shard {rank} serves")
    sleep_for_ever()


def router(config: dict[str, Any]) -> None:
    note(event="started")
    control = socket.socket(socket.AF_UNIX)
    deadline = time.monotonic() + 10
    while True:
        try:
            control.connect(config["control_address"])
            break
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    epoch = 0

    def send(event: str, **fields: Any) -> None:
        control.sendall(json.dumps({"event": event, **fields}).encode() + b"\n")

    def hung(number: int, frame: object) -> None:
        send("shard_hung", epoch=epoch, rank=1, reason="no heartbeat for 10 s")

    signal.signal(signal.SIGUSR1, hung)
    for line in control.makefile("r"):
        event = json.loads(line)
        note(**event)
        if event["event"] == "group":
            epoch = event["epoch"]
            if "FAKE_NEVER_READY" not in os.environ:
                send("ready", epoch=epoch, model_id=config["model_id"], max_total_tokens=64)
            if "FAKE_STEPS" in os.environ:
                send("step", epoch=epoch)
        elif event["event"] == "drain":
            patience = float(os.environ.get("FAKE_DRAIN", "0"))
            time.sleep(patience)
            send("drained")
        elif event["event"] == "failed":
            send("failed_delivered")
    sleep_for_ever()


def gateway(config: dict[str, Any]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int)
    listener = socket.socket(fileno=parser.parse_known_args()[0].fd)
    note(address=listener.getsockname(), status=config["status_path"])
    sleep_for_ever()


if __name__ == "__main__":
    ROLE = sys.argv[1]
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))
    path = sys.argv[sys.argv.index("--config") + 1]
    with open(path) as stream:
        {"shard": shard, "router": router, "gateway": gateway}[ROLE](json.load(stream))
