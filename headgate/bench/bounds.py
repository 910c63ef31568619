"""`python -m headgate.bench.bounds`: what the benchmark's workloads take at least on a machine.

The same requests, scheduler and sizes of steps as a server has, on a clock that only arithmetic and
reading move on (ideal_server.py), at shares of the best rates that were measured beside a benchmark
(`--of docs/benchmarks.jsonl`: and what its servers did) or are measured now. All at their best, and
every guess right, no order of the same arithmetic can be faster; with the shares that parts reach
by themselves it is what a server could do if nothing stood between them.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from headgate.bench.case_flags import add_case_flags, prepare_model, take_case_flags
from headgate.bench.contestants import HEADGATE, KIND_FLAGS, KINDS
from headgate.bench.ideal_server import IdealRun, IdealServer, Rates, StepDemand
from headgate.bench.results import Session
from headgate.bench.roofline import measure
from headgate.bench.workload import SEED, Case, make_requests
from headgate.launcher.autosize import Sizes, kv_bytes_per_token, work_out_sizes
from headgate.launcher.cli import parse_serve
from headgate.launcher.hardware import find_hardware
from headgate.launcher.model_facts import ModelFacts, read_model_facts
from headgate.router.scheduler_config import SchedulerConfig

PLAN = "default:1:32,default:8:64,default:32:64,shared-prefix:8:64"
# Bytes of a layer's weight, scales included; the vocabulary's are bytes (a shortlist's copy).
_WEIGHT_BYTES = {"bf16": 2.0, "bf16-medium": 2.0, "int8": 1.0, "int4": 0.5 + 2 / 32}


@dataclass(frozen=True, slots=True)
class Best:
    """The machine's best rates: operations and bytes a second; 0: it has no such instruction."""

    fma: float
    pairs: float
    vnni: float
    memory: float


def main() -> int:
    arguments = _parse()
    session = Session.load(arguments.of) if arguments.of else None
    best = _best_of(session) if session else _best_now()
    files, tokenizer = prepare_model(arguments.model_id)
    model = read_model_facts(Path(files.path))
    print(
        f"float32 {best.fma / 1e9:.0f} GFLOP/s, bfloat16 pairs {best.pairs / 1e9:.0f}, "
        f"int8 {best.vnni / 1e9:.0f} GOP/s, memory {best.memory / 1e9:.1f} GB/s\n\n"
        "| weights | workload | at a time | tokens/s | first token ms | measured |\n"
        "|---|---|---|---|---|---|"
    )
    for kind in arguments.kinds:
        if kind in ("int8", "int4") and not best.vnni:
            print(f"{kind}: this machine has no int8 dot product to be bound by", file=sys.stderr)
            continue
        config = parse_serve([*KIND_FLAGS[kind], *arguments.flags], dict(os.environ))
        sizes = work_out_sizes(model, config, find_hardware())
        rates = _rates(kind, best, arguments)
        demand = _demand(kind, model, sizes)
        for case in arguments.plan:
            requests = make_requests(case.workload, case.requests, SEED, 1, tokenizer)
            prompts = [(tokenizer.encode(one.prompt).ids, one.output_tokens) for one in requests]
            server = IdealServer(_scheduler_config(sizes), demand, rates, arguments.right)
            run = server.run(prompts, case.concurrency)
            print(_line(kind, case, run, session), flush=True)
    return 0


def _best_of(session: Session) -> Best:
    """Medians of what was measured beside a benchmark's runs."""
    found = [roofline for run in session.runs for roofline in run.rooflines]
    fma, pairs, vnni, memory = (
        median(roofline[name] for roofline in found)
        for name in ("fma_gflops", "bf16_gflops", "vnni_gops", "memory_gb_s")
    )
    return Best(fma * 1e9, pairs * 1e9, vnni * 1e9, memory * 1e9)


def _best_now() -> Best:
    found = measure(find_hardware().cores)
    return Best(
        found.fma_gflops * 1e9,
        found.bf16_gflops * 1e9,
        found.vnni_gops * 1e9,
        found.memory_gb_s * 1e9,
    )


def _rates(kind: str, best: Best, arguments: argparse.Namespace) -> Rates:
    """Where an instruction is missing, what would take its time takes none: still a bound."""
    pairs = best.pairs or best.fma
    products = {"bf16": best.fma, "bf16-medium": pairs}.get(kind, best.vnni)
    return Rates(
        products=products * arguments.products,
        head=(best.vnni or math.inf) * arguments.head,
        attention=(best.fma if kind == "bf16" else pairs) * arguments.attention,
        memory=best.memory * arguments.memory,
        others=arguments.others,
        round_trip=arguments.round_trip / 1e3,
    )


def _demand(kind: str, model: ModelFacts, sizes: Sizes) -> StepDemand:
    head, layers = model.embedding_parameters, model.layer_parameters
    return StepDemand(
        num_layers=model.num_layers,
        layer_flops=2 * layers,
        head_flops=2 * head,
        attention_flops=4 * model.num_layers * model.num_heads * model.head_dim,
        weight_bytes=layers * _WEIGHT_BYTES[kind] + head,
        kv_bytes=kv_bytes_per_token(model, 1, sizes.kv_cache_dtype)[1],
    )


def _scheduler_config(sizes: Sizes) -> SchedulerConfig:
    return SchedulerConfig(
        num_blocks=sizes.num_blocks,
        block_size=sizes.block_size,
        max_batch_prefill_tokens=sizes.max_batch_prefill_tokens,
        max_batch_size=sizes.max_batch_size,
        max_total_tokens=sizes.max_total_tokens,
        draft_tokens=sizes.speculate,
    )


def _line(kind: str, case: Case, run: IdealRun, session: Session | None) -> str:
    measured = "; ".join(_measured(session, kind, case)) if session else ""
    return (
        f"| {kind} | {case.workload} | {case.concurrency} | {run.output_tokens_per_s:.0f} "
        f"| {run.ttft_p50:.0f} | {measured} |"
    )


def _measured(session: Session, kind: str, case: Case) -> Iterator[str]:
    """Medians of each server's runs with weights that are compared with this kind."""
    for server in dict.fromkeys(run.server for run in session.runs):
        wanted = kind if server.startswith(HEADGATE) else KINDS[kind]
        results = [
            run.result
            for run in session.runs
            if (run.server, run.kind, *run.case)
            == (server, wanted, case.workload, case.concurrency)
        ]
        if results:
            tokens = median(result["output_tokens_per_s"] for result in results)
            first = median(result["ttft_p50"] for result in results)
            yield f"{server} {tokens:.0f}, {first:.0f} ms"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m headgate.bench.bounds", description=__doc__)
    parser.add_argument(
        "--of",
        type=Path,
        metavar="FILE",
        help="a benchmark's .jsonl; steps' sizes are this machine's (default: rates are measured)",
    )
    add_case_flags(parser, PLAN, ",".join(KINDS))
    for name, what in (
        ("products", "of layers, as a share of their best rate"),
        ("head", "the vocabulary's product, as a share of int8's best rate"),
        ("attention", "its multiply-adds, as a share of their best rate"),
        ("memory", "reading, as a share of the best rate"),
        ("right", "guessed tokens that are right, as a share of those guessed"),
    ):
        parser.add_argument(f"--{name}", type=float, default=1.0, help=f"{what} (default: 1)")
    parser.add_argument(
        "--others", type=float, default=0.0, help="share of all cores that others take (default: 0)"
    )
    parser.add_argument(
        "--round-trip",
        type=float,
        default=0.0,
        metavar="MS",
        help="from a step's end to a client and back; steps do not wait for it (default: 0)",
    )
    arguments = parser.parse_args()
    if arguments.of and not arguments.of.is_file():
        parser.error(f"--of: there is no file {arguments.of}")
    take_case_flags(parser, arguments)
    return arguments


if __name__ == "__main__":
    sys.exit(main())
