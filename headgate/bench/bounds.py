"""`python -m headgate.bench.bounds`: what the benchmark's workloads take at least on a machine.

The same requests, scheduler and sizes of steps as a server has, on a clock that only arithmetic and
reading move on (ideal_server.py), at shares of the best rates that were measured beside a benchmark
(`--of docs/benchmarks.jsonl`: and what its servers did) or are measured now. All are at their best
and every guess is right, unless said otherwise: with the shares that parts reach by themselves it
is what a server could do if nothing stood between them.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from statistics import median

from headgate.bench.case_flags import add_case_flags, prepare_model, take_case_flags
from headgate.bench.contestants import HEADGATE, KIND_FLAGS, KINDS
from headgate.bench.ideal_server import IdealRun, IdealServer, Rates, StepDemand
from headgate.bench.results import Session
from headgate.bench.roofline import Roofline, measure
from headgate.bench.workload import SEED, Case, make_requests
from headgate.launcher.autosize import Sizes, kv_bytes_per_token, work_out_sizes
from headgate.launcher.cli import parse_serve
from headgate.launcher.hardware import find_hardware
from headgate.launcher.model_facts import ModelFacts, read_model_facts
from headgate.router.scheduler_config import SchedulerConfig

PLAN = "default:1:32,default:8:64,default:32:64,shared-prefix:8:64"
# Bytes of a layer's weight, scales included; the vocabulary's are bytes (a shortlist's copy).
_WEIGHT_BYTES = {"bf16": 2.0, "bf16-medium": 2.0, "int8": 1.0, "int4": 0.5 + 2 / 32}


def main() -> int:
    arguments = _parse()
    session = Session.load(arguments.of) if arguments.of else None
    best = _best_of(session) if session else measure(find_hardware().cores)
    files, tokenizer = prepare_model(arguments.model_id)
    model = read_model_facts(Path(files.path))
    print(
        f"float32 {best.fma_gflops:.0f} GFLOP/s, bfloat16 pairs {best.bf16_gflops:.0f}, "
        f"int8 {best.vnni_gops:.0f} GOP/s, memory {best.memory_gb_s:.1f} GB/s\n\n"
        "| weights | workload | at a time | tokens/s | first token ms | measured |\n"
        "|---|---|---|---|---|---|"
    )
    for kind in arguments.kinds:
        if kind in ("int8", "int4") and not best.vnni_gops:
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
            run = server.run(prompts, case.concurrency, arguments.round_trip / 1e3)
            print(_line(kind, case, run, session), flush=True)
    return 0


def _best_of(session: Session) -> Roofline:
    """Medians of what was measured beside a benchmark's runs."""
    found = [roofline for run in session.runs for roofline in run.rooflines]
    names = (field.name for field in fields(Roofline) if field.name != "threads")
    rates = {name: median(roofline[name] for roofline in found) for name in names}
    return Roofline(threads=session.machine["cores"], **rates)


def _rates(kind: str, best: Roofline, arguments: argparse.Namespace) -> Rates:
    """Where int8's instruction is missing, the vocabulary takes no time: still a bound."""
    pairs = best.bf16_gflops or best.fma_gflops
    products = {"bf16": best.fma_gflops, "bf16-medium": pairs}.get(kind, best.vnni_gops)
    attention = {"bf16": best.fma_gflops, "bf16-medium": pairs}.get(kind, best.vnni_gops)
    return Rates(
        products=products * 1e9 * arguments.products,
        head=(best.vnni_gops or math.inf) * 1e9 * arguments.head,
        attention=attention * 1e9 * arguments.attention,
        memory=best.memory_gb_s * 1e9 * arguments.memory,
        others=arguments.others,
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
    ):
        share = _number(lambda x: 0 < x <= 1, "above 0 and at most 1")
        parser.add_argument(f"--{name}", type=share, default=1.0, help=f"{what} (default: 1)")
    parser.add_argument(
        "--right",
        type=_number(lambda x: 0 <= x <= 1, "from 0 to 1"),
        default=1.0,
        help="guessed tokens that are right, as a share of those guessed (default: 1)",
    )
    parser.add_argument(
        "--others",
        type=_number(lambda x: 0 <= x < 1, "from 0 to below 1"),
        default=0.0,
        help="share of all cores that others take (default: 0)",
    )
    parser.add_argument(
        "--round-trip",
        type=_number(lambda x: 0 <= x < math.inf, "0 or more"),
        default=0.0,
        metavar="MS",
        help="from a step's end to a client and back; steps do not wait for it (default: 0)",
    )
    arguments = parser.parse_args()
    if arguments.of and not arguments.of.is_file():
        parser.error(f"--of: there is no file {arguments.of}")
    take_case_flags(parser, arguments)
    return arguments


def _number(holds: Callable[[float], bool], limits: str) -> Callable[[str], float]:
    """Reads a number for which that holds."""

    def read(text: str) -> float:
        try:
            if holds(value := float(text)):
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"{text} is not a number {limits}")

    return read


if __name__ == "__main__":
    sys.exit(main())
