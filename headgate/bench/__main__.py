"""`python -m headgate.bench`: Headgate, and peers where given, on one set of workloads, in turn.

Writes the measurements (.jsonl), a page (.md) and a chart (.svg). Each round starts every server
once; `make bench` and `make bench-peers` are this command with the paths of docs/. What was
measured is written after each server, so that a command that ended early, by itself (`--minutes`)
or not, can be gone on with (`--resume`).
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tokenizers

from headgate import __version__
from headgate.bench import client
from headgate.bench.case_flags import add_case_flags, prepare_model, take_case_flags
from headgate.bench.contestants import KINDS, PLAIN, Contestant, add_peer_flags, headgate, peers
from headgate.bench.plot import throughput_chart
from headgate.bench.processes import cpu_used, usage
from headgate.bench.report import render
from headgate.bench.results import Run, Session
from headgate.bench.roofline import measure
from headgate.bench.server import ServerFailed, free_port, running
from headgate.bench.workload import SEED, Case, make_requests, make_warm_up
from headgate.launcher.hardware import find_hardware
from headgate.launcher.model_facts import read_model_facts
from headgate.launcher.model_files import ModelFiles

FULL_PLAN = "default:1:32,default:8:64,default:32:64,default:128:128,shared-prefix:8:64"
SHORT_PLAN = "default:1:8,default:8:32,default:32:64,shared-prefix:8:32"
WARM_UP_REQUESTS = 4


def main() -> int:
    arguments = _parse()
    files, tokenizer = prepare_model(arguments.model_id)
    session = _session(arguments, _machine(), _model(files))
    contestants = _contestants(arguments, files)
    ends = time.monotonic() + 60 * arguments.minutes
    for number in range(arguments.runs):
        missing = [one for one in contestants if not session.has(one, number, arguments.plan)]
        for contestant in missing:
            if arguments.minutes and time.monotonic() > ends:
                print("time is up; --resume goes on from here", file=sys.stderr)
                return 0
            try:
                runs = _measure(
                    contestant, arguments.plan, number, tokenizer, session.machine["cores"]
                )
            except ServerFailed as error:
                print(f"{contestant.title} failed: {error}", file=sys.stderr, flush=True)
                if contestant.name == contestants[0].name:
                    return 1
                continue
            session.replace(contestant, number, runs)
            for run in runs:
                _say(run)
            _write(session, arguments.output)
    return 0


def _session(
    arguments: argparse.Namespace, machine: dict[str, Any], model: dict[str, Any]
) -> Session:
    """A new one, or with --resume the one that is in the output. Exits where that is of another
    machine, version or model."""
    path = arguments.output.with_suffix(".jsonl")
    if not arguments.resume or not path.exists():
        return Session(machine, model)
    try:
        found = Session.load(path)
    except TypeError as error:  # other fields
        raise SystemExit(f"--resume: {path} was written by another version: {error}") from error
    for name in ("cpu", "cores", "version"):
        if found.machine[name] != machine[name]:
            raise SystemExit(
                f"--resume: {path} is of {name} {found.machine[name]}, not {machine[name]}"
            )
    if found.model != model:
        raise SystemExit(f"--resume: {path} is of the model {found.model['name']}")
    return found


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m headgate.bench", description=__doc__)
    parser.add_argument("--runs", type=int, default=3, help="rounds (default: 3)")
    add_case_flags(parser, FULL_PLAN, ",".join(KINDS))
    parser.add_argument("--short", action="store_true", help=f"one round of {SHORT_PLAN}")
    parser.add_argument(
        "--plain", action="store_true", help="also measure Headgate without speculation"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks"), help="path of what is written, less .md"
    )
    parser.add_argument(
        "--resume", action="store_true", help="measure only what the output does not hold yet"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=0.0,
        help="start no server later than this, leave the rest to --resume (default: no limit)",
    )
    add_peer_flags(parser)
    arguments = parser.parse_args()
    if arguments.short:
        arguments.runs, arguments.plan = 1, SHORT_PLAN
    take_case_flags(parser, arguments)
    return arguments


def _contestants(arguments: argparse.Namespace, files: ModelFiles) -> list[Contestant]:
    """Headgate and its peers of the same kind next to each other, each once."""
    found: list[Contestant] = []
    for kind in arguments.kinds:
        flags = arguments.flags
        found.append(headgate(kind, arguments.model_id, flags))
        if arguments.plain:
            flags = [*flags, "--speculate", "0"]
            found.append(headgate(kind, arguments.model_id, flags, PLAIN))
        others = peers(arguments, KINDS[kind], files.path)
        titles = {contestant.title for contestant in found}
        found += [peer for peer in others if peer.title not in titles]
    return found


def _measure(
    contestant: Contestant,
    plan: list[Case],
    number: int,
    tokenizer: tokenizers.Tokenizer,
    cores: int,
) -> list[Run]:
    """Round `number` of one server, started for it. Raises ServerFailed."""
    port = free_port()
    runs: list[Run] = []
    with running(contestant.command(port), f"http://127.0.0.1:{port}", contestant.health) as server:
        for place, (workload, concurrency, count) in enumerate(plan):
            words = 1 + 10 * place + number
            rooflines = [runs[-1].rooflines[-1] if runs else asdict(measure(cores))]
            warm_up = make_warm_up(WARM_UP_REQUESTS if place == 0 else 1, SEED, words, tokenizer)
            client.run(server.url, contestant.model, warm_up, concurrency, contestant.exact)
            requests = make_requests(workload, count, SEED, words, tokenizer)
            before = usage(server.pid)
            result = client.run(
                server.url, contestant.model, requests, concurrency, contestant.exact
            )
            after = usage(server.pid)
            rooflines.append(asdict(measure(cores)))
            runs.append(
                Run(
                    server=contestant.name,
                    kind=contestant.kind,
                    workload=workload,
                    concurrency=concurrency,
                    requests=count,
                    round=number,
                    ready_seconds=server.ready_seconds,
                    cpu_seconds=cpu_used(before, after),
                    peak_bytes={role: entry.peak_bytes for role, entry in after.items()},
                    result=asdict(result),
                    rooflines=rooflines,
                )
            )
    return runs


def _say(run: Run) -> None:
    result = run.result
    trouble = f", {result['errors']} errors: {result['first_error']}" if result["errors"] else ""
    print(
        f"round {run.round + 1}: {run.server} {run.kind} {run.workload} {run.concurrency}: "
        f"{result['output_tokens_per_s']:.1f} tokens/s, first token {result['ttft_p50']:.0f} ms"
        + trouble,
        file=sys.stderr,
        flush=True,
    )


def _write(session: Session, output: Path) -> None:
    session.save(output.with_suffix(".jsonl"))
    output.with_suffix(".md").write_text(render(session, output.name))
    output.with_suffix(".svg").write_text(throughput_chart(session))


def _machine() -> dict[str, Any]:
    hardware = find_hardware()
    return {
        "cpu": _cpu_name(),
        "cores": hardware.cores,
        "memory_gib": round(hardware.memory_limit / (1 << 30)),
        "version": __version__,
        "when": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": os.environ.get("BENCH_COMMAND") or "python -m headgate.bench",
    }


def _cpu_name() -> str:
    """With the instruction sets that matter."""
    model, flags = platform.processor() or platform.machine(), ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            model = value.strip()
        elif key.strip() == "flags":
            flags = value
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")
    return f"{model} ({', '.join(name for name in wanted if name in flags.split())})"


def _model(files: ModelFiles) -> dict[str, Any]:
    facts = read_model_facts(Path(files.path))
    vocabulary, layers = facts.embedding_parameters, facts.layer_parameters
    # What the last layer does after its attention, which few tokens of a prompt need.
    last = facts.hidden_size * (facts.num_heads * facts.head_dim + 3 * facts.intermediate_size)
    return {
        "name": files.model_id,
        "parameters": facts.parameters,
        "tied_vocabulary": vocabulary if facts.tied_embeddings else 0,
        "prompt_flops": 2 * (layers - last),
        "output_flops": 2 * (layers + vocabulary),
    }


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped too
    sys.exit(main())
