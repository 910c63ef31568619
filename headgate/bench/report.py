"""docs/benchmarks.md out of a session's measurements."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product

from headgate.bench.client import percentile
from headgate.bench.contestants import HEADGATE, KINDS, PLAIN
from headgate.bench.results import Run, Session, middle, spread

_BYTES_PER_WEIGHT = {"bf16": 2.0, "bf16-medium": 2.0, "int8": 1.0, "int4": 0.5}
_PEAK_OF_KIND = {
    "bf16": ("fma_gflops", "fp32 FMA"),
    "bf16-medium": ("bf16_gflops", "bf16 dot product"),
    "int8": ("vnni_gops", "int8 VNNI"),
    "int4": ("vnni_gops", "int8 VNNI"),
}
_GIB = 1 << 30

_HEAD = """# Benchmarks

Written by `{command}` on {when}. The raw figures are in [{name}.jsonl]({name}.jsonl).

`make bench` starts the server once per kind of weights and round, sends the workloads below over
HTTP and measures what the machine can do at best before and after each. `make bench-peers` does the
same with other servers in turn; where they are installed is given by its variables (`make help`).
`BENCH_ARGS="--resume --minutes 30"` goes on with what is measured already, for half an hour.
Machines drift and are shared: only figures of one session can be compared, and ratios tell more
than rates.

- default: prompts of 16-64 (40 %), 100-200 (40 %) or 400-600 tokens (20 %), answers of 32-128,
  greedy, ends of sequence ignored.
- shared-prefix: one prefix of 600 tokens, then 20-60 of each request's own; the same answers.

A small model's greedy answers that may not end repeat themselves, which suits Headgate's
[speculation](speculation.md); "no drafts" is the same server without it (`--speculate 0`).

Lengths are the same in every run; words are a round's own. Latencies are medians over the rounds.

| | |
|---|---|
{facts}

![Output tokens per second]({name}.svg)
"""


def render(session: Session, name: str) -> str:
    """The page that lies beside `name`.jsonl and `name`.svg."""
    machine, model = session.machine, session.model
    facts = {
        "machine": f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB",
        "model": f"{model['name']}, {model['parameters'] / 1e6:.0f} M parameters",
        "Headgate": machine["version"],
        "rounds": str(1 + max((run.round for run in session.runs), default=0)),
        "best of the machine": f"fp32 FMA {_range(session, 'fma_gflops')} GFLOP/s; bf16 dot "
        f"product {_range(session, 'bf16_gflops')} GFLOP/s; int8 VNNI "
        f"{_range(session, 'vnni_gops')} GOP/s; memory {_range(session, 'memory_gb_s')} GB/s in "
        f"huge pages and {_range(session, 'small_pages_gb_s')} in pages of 4 KB; a cache line "
        f"from core to core in {_range(session, 'core_to_core_ns')} ns (10th, 50th and 90th "
        "percentile of what was measured before and after the runs)",
    }
    parts = [
        _HEAD.format(
            name=name,
            command=machine["command"],
            when=machine["when"],
            facts="\n".join(f"| {name} | {text} |" for name, text in facts.items()),
        )
    ]
    for kind in KINDS:
        if session.servers(kind):
            parts.append(f"## {kind} weights\n\n{_rates(session, kind)}")
    if len(session.servers()) > len(session.servers_of(HEADGATE)):
        parts.append(f"## Headgate against its peers\n\n{_ratios(session)}")
    parts.append(f"## Share of what the machine can do\n\n{_shares(session)}")
    parts.append(f"## Processes\n\n{_processes(session)}")
    return "\n".join(parts)


def _rates(session: Session, kind: str) -> str:
    rows = []
    for case in session.cases():
        for server, _ in session.servers(kind):
            runs = session.of(server, kind, case)
            if not runs:
                continue
            rates = _values(runs, "output_tokens_per_s")
            rows.append(
                (
                    case[0],
                    str(case[1]),
                    server,
                    f"{middle(rates):.1f}",
                    f"{spread(rates):.1%}" if len(rates) > 1 else "1 run",
                    _pair(runs, "ttft"),
                    _pair(runs, "itl"),
                )
            )
    head = ("workload", "at a time", "server", "output tokens/s", "spread")
    return _table((*head, "first token p50 / p90 ms", "between tokens p50 / p90 ms"), rows)


def _ratios(session: Session) -> str:
    """Headgate's rate over each peer's, of a kind of weights that is compared with the peer's."""
    rows = []
    pairs = product(session.servers_of(HEADGATE), session.servers())
    for case, ((_, own_kind), (server, kind)) in product(session.cases(), pairs):
        own, other = session.of(HEADGATE, own_kind, case), session.of(server, kind, case)
        comparable = own_kind if server == PLAIN else KINDS[own_kind]
        if server == HEADGATE or comparable != kind or not own or not other:
            continue
        rows.append(
            (
                case[0],
                str(case[1]),
                own_kind,
                f"{server} {kind}",
                f"{_ratio(own, other, 'output_tokens_per_s'):.2f}",
                f"{_ratio(own, other, 'ttft_p50'):.2f}",
            )
        )
    text = (
        "Headgate's median over the peer's: above 1 is more tokens, below 1 an earlier first token."
    )
    head = ("workload", "at a time", "Headgate", "peer", "output tokens/s", "first token")
    return text + "\n\n" + _table(head, rows)


def _shares(session: Session) -> str:
    model, rows = session.model, []
    for server, kind in session.servers():
        for case in session.cases():
            runs = session.of(server, kind, case)
            if not runs or case[0] != "default":
                continue
            if case[1] == 1:
                runs = [run for run in runs if _tokens_come_singly(run)]
                if not runs:
                    continue
                rates = [_decoding_gb_s(run, model) for run in runs]
                what, shown = "memory bandwidth, decoding", f"{middle(rates):.1f} GB/s"
                share = f"{_share(runs, rates, 'memory_gb_s')} ("
                share += f"{_share(runs, rates, 'small_pages_gb_s')} of what pages of 4 KB give)"
            elif kind in _PEAK_OF_KIND:
                name, what = _PEAK_OF_KIND[kind]
                rates = [_useful_gflops(run, model) for run in runs]
                shown, share = f"{middle(rates):.0f} GFLOP/s", _share(runs, rates, name)
            else:
                continue
            rows.append((f"{server} {kind}", str(case[1]), what, shown, share))
    text = (
        "Useful arithmetic: two operations per weight and token, the vocabulary's and those after "
        "the last layer's attention only for tokens of answers; prompts and answers together, over "
        "the whole time of the run. Decoding "
        "one request: the weights' bytes (2, 1 or 0.5 each, scales not counted; of the "
        "vocabulary's bfloat16 weights Headgate reads int8 copies) over the median "
        "time between tokens, where they come one by one. Shares are of the best of the machine "
        "before and after each run, and their medians are given."
    )
    return text + "\n\n" + _table(("server", "at a time", "of", "reached", "share"), rows)


def _processes(session: Session) -> str:
    rows = []
    for server, kind in session.servers():
        own = [run for run in session.runs if (run.server, run.kind) == (server, kind)]
        cpu: dict[str, list[float]] = {}
        for run in own:
            for role, seconds in run.cpu_seconds.items():
                cpu.setdefault(role, []).append(seconds / max(run.result["seconds"], 1e-9))
        peak = middle(
            max(sum(run.peak_bytes.values()) for run in own if run.round == number)
            for number in {run.round for run in own}
        )
        roles = ", ".join(f"{role} {middle(shares):.2f}" for role, shares in sorted(cpu.items()))
        ready = middle(run.ready_seconds for run in own)
        rows.append((f"{server} {kind}", roles, f"{peak / _GIB:.2f}", f"{ready:.1f}"))
    text = (
        "CPU seconds per second of a run, by process; resident memory at its peak, summed over "
        "the server's processes (shared pages count in each); seconds from the start of the "
        "process until it is ready."
    )
    head = ("server", "CPU seconds per second", "peak memory GiB", "ready s")
    return text + "\n\n" + _table(head, rows)


def _useful_gflops(run: Run, model: dict[str, float]) -> float:
    prompt, output = run.result["prompt_tokens"], run.result["output_tokens"]
    work = prompt * model["prompt_flops"] + output * model["output_flops"]
    return float(work / run.result["seconds"] / 1e9)


def _tokens_come_singly(run: Run) -> bool:
    """Else the median time between two is no time of a token."""
    return bool(
        run.result["itl_p50"] / 1e3 > run.result["seconds"] / run.result["output_tokens"] / 2
    )


def _values(runs: Iterable[Run], name: str) -> list[float]:
    return [run.result[name] for run in runs]


def _pair(runs: Sequence[Run], name: str) -> str:
    low, high = (middle(_values(runs, f"{name}_{part}")) for part in ("p50", "p90"))
    return f"{low:.0f} / {high:.0f}" if low >= 100 else f"{low:.1f} / {high:.1f}"


def _ratio(own: Sequence[Run], other: Sequence[Run], name: str) -> float:
    below = middle(_values(other, name))
    return middle(_values(own, name)) / below if below else 0.0


def _range(session: Session, name: str) -> str:
    found = session.roofs(name)
    return ", ".join(f"{percentile(found, part):.0f}" for part in (0.1, 0.5, 0.9))


def _decoding_gb_s(run: Run, model: dict[str, float]) -> float:
    """At which weights were read for one token after another."""
    size = model["parameters"] * _BYTES_PER_WEIGHT[run.kind]
    if run.server in (HEADGATE, PLAIN) and KINDS[run.kind] == "bf16":
        size -= model.get("tied_vocabulary", 0)  # a byte of two: it has a shortlist
    return size / run.result["itl_p50"] / 1e6


def _share(runs: Sequence[Run], rates: Sequence[float], name: str) -> str:
    """Of each run's rate in that of the machine beside it, the median."""
    shares = [
        rate / run.roof(name) for run, rate in zip(runs, rates, strict=True) if run.roof(name)
    ]
    return f"{middle(shares):.0%}" if shares else "not measured"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"
