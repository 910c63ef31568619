"""`python -m headgate.bench.host`: what gateway and router cost per token, as one JSON line.

256 HTTP streams through the real launcher, gateway and router to a null shard, which answers at
once without a model; and the scheduler by itself, in this process. The load generator shares the
cores with the server: its CPU time is told beside the server's.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time

from headgate.bench.processes import cpu_used, usage
from headgate.bench.scheduling import lookup_microseconds, step_milliseconds
from headgate.bench.server import free_port, running
from headgate.bench.streams import Streams

PROMPT = "The river behind the old library was quiet in the morning, and no lantern burned. " * 2


def measure_host(streams: int, tokens: int, seconds: float) -> dict[str, float]:
    """Tokens per second and CPU per token of each process, at `streams` answers of `tokens`."""
    port = free_port()
    flags = {
        "port": port,
        "max-concurrent-requests": streams + 64,
        "max-batch-size": streams,
        "max-batch-prefill-tokens": max(2 * streams, 256),
        "max-batch-total-tokens": streams * (tokens + 128),
        "max-total-tokens": tokens + 128,
    }
    command = [sys.executable, "-m", "headgate.launcher", "serve", "--null-shard"]
    command += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    body = {"prompt": PROMPT, "max_tokens": tokens, "stream": True, "temperature": 0}
    with running(command, f"http://127.0.0.1:{port}") as server:
        load = Streams(server.url, streams, body | {"ignore_eos": True}, tokens)
        load.run(min(seconds, 2.0))
        before, own, started = usage(server.pid), _own_cpu(), time.monotonic()
        count, answers = load.run(seconds)
        took = time.monotonic() - started
        spent, client = cpu_used(before, usage(server.pid)), _own_cpu() - own
        load.close()
    per_token = {role: round(cpu * 1e6 / count, 2) for role, cpu in spent.items()}
    return {
        "tokens_per_s": round(count / took, 1),
        "cpu_us_per_token": round((spent["gateway"] + spent["router"]) * 1e6 / count, 2),
        "gateway_us_per_token": per_token["gateway"],
        "router_us_per_token": per_token["router"],
        "shard_us_per_token": per_token["shard"],
        "client_us_per_token": round(client * 1e6 / count, 2),
        "answers_per_s": round(answers / took, 1),
    }


def _own_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m headgate.bench.host", description=__doc__)
    parser.add_argument("--streams", type=int, default=256, help="concurrent HTTP streams")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of each answer")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of the measurement")
    arguments = parser.parse_args()
    line = measure_host(arguments.streams, arguments.tokens, arguments.seconds)
    line["schedule_update_ms_256"] = round(step_milliseconds(256), 3)
    for blocks in (1_000, 100_000):
        line[f"lookup_us_{blocks}_blocks"] = round(lookup_microseconds(blocks), 1)
    print(json.dumps(line))
    return 0


if __name__ == "__main__":
    sys.exit(main())
