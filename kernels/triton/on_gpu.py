"""`python -m headgate.kernels.triton.on_gpu check|time`: the kernels on the GPU of this machine.

`check` compares each operation with the reference on the same inputs, and rows' bits across batches
and chunks. `time` measures each beside the reference in PyTorch (whose attention is PyTorch's own
and whose products are cuBLAS), as it is and through torch.compile, and writes docs/gpu.json and
docs/gpu.md. Both need torch and triton only, and no network. Without a GPU they say so and fail.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton

from headgate.kernels import reference
from headgate.kernels import triton as kernels
from headgate.kernels.quantised import quantise
from headgate.kernels.triton.cases import CHIPS, DTYPE, MODELS, Case, Maker, all_cases
from headgate.kernels.triton.launch import INTERPRETED, chip
from headgate.kernels.triton.packed_weight import PackedQuantised
from headgate.kernels.triton.report import GPUS
from headgate.quant_kinds import KINDS

_DOCS = Path(__file__).resolve().parents[2] / "docs"
_DEVICE = "cuda"
_SEED = 11
_REPLAYED = 20  # milliseconds of replays
_ROWS = (1, 33, 65, 130, 600)  # for which products have different tiles
_TOLERANCE = 3e-2  # of bfloat16 results, several roundings deep
# Heads (two for each of keys and values), head size, dtypes of queries and of the cache, block
# size, window, soft cap, ALiBi.
_KINDS: tuple[tuple[int, int, torch.dtype, torch.dtype, int, int, float, bool], ...] = (
    (4, 32, torch.float32, torch.float32, 16, 0, 0.0, False),
    (4, 64, torch.float16, torch.float16, 32, 300, 0.0, False),
    (2, 80, torch.bfloat16, torch.bfloat16, 7, 0, 30.0, False),
    (8, 96, torch.bfloat16, torch.float8_e5m2, 16, 0, 0.0, True),
    (2, 256, torch.float16, torch.float16, 16, 700, 30.0, False),
)


@contextmanager
def _reference_ops() -> Iterator[None]:
    """The cases' calls go to the reference."""
    tables = (kernels.OPS, kernels.BATCH_INVARIANT)
    before = [dict(table) for table in tables]
    for table in tables:
        table.update({name: op for name, op in reference.OPS.items() if name in table})
    try:
        yield
    finally:
        for table, ours in zip(tables, before, strict=True):
            table.update(ours)


def _made(case: Case) -> Callable[[], Any]:
    """The call, with the same random inputs each time it is made."""
    torch.manual_seed(_SEED)
    return case.make(Maker(_DEVICE))


def _has_reference(case: Case) -> bool:
    return case.op.split(",")[0].split(" ")[0] in reference.OPS


def gpu_name() -> str:
    """The GPU that kernels run on; "" where there is none."""
    if INTERPRETED.value or not torch.cuda.is_available():
        return ""
    return torch.cuda.get_device_name()


def cases_here(model: str) -> list[Case]:
    """Those of the model ("" for all) that this GPU can run."""
    return [
        case
        for case in all_cases()
        if model in ("", case.model) and (case.chips == CHIPS or chip() in case.chips)
    ]


# ------------------------------------------------------------------ check


def check(model: str) -> list[str]:
    """What is wrong; nothing where all is well."""
    problems = []
    for case in cases_here(model):
        try:
            problem = _difference(case)
        except Exception as error:  # the other cases are checked all the same
            problem = f"{type(error).__name__}: {error}"
        print(f"{'FAILED' if problem else 'ok':8}{case.name}", flush=True)
        if problem:
            problems.append(f"{case.name}: {problem}")
    return problems + kinds_of_attention() + _bits_of_attention() + bits_of_products()


def _difference(case: Case) -> str:
    got = _made(case)()
    torch.cuda.synchronize()
    if not _has_reference(case) or got is None:
        return ""
    with _reference_ops():
        wanted = _made(case)()
    pairs = zip(_tensors(got), _tensors(wanted), strict=True)
    for ours, theirs in pairs:
        ours, theirs = ours.double(), theirs.double()
        scale = theirs.abs().max().clamp_min(1e-6)
        error = float(((ours - theirs).abs() / scale).max())
        if not error <= _TOLERANCE:
            return f"differs by {error:.3g} of the largest value, {_TOLERANCE} allowed"
    return ""


def _tensors(result: Any) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def kinds_of_attention(context: int = 1100) -> list[str]:
    """What the models' cases don't have: head sizes, windows, soft caps, ALiBi, narrow caches."""
    problems = []
    for heads, dim, dtype, kept, block_size, window, cap, alibi in _KINDS:
        torch.manual_seed(_SEED)
        blocks = -(-context // block_size)
        q = torch.randn(context, heads, dim, device=_DEVICE).to(dtype)
        caches = torch.randn(2, blocks, block_size, heads // 2, dim, device=_DEVICE).to(kept)
        table = torch.randperm(blocks, device=_DEVICE).int()
        slopes = torch.linspace(0.1, 0.9, heads, device=_DEVICE) if alibi else None
        chunks = [(0, min(90, context)), (context - 1, context), (context // 2, context // 2 + 3)]
        call = (table, chunks, window, cap, slopes)
        ours = _attend(q, caches, *call)
        with _reference_ops():
            theirs = _attend(q.float(), caches.float(), *call)
        error = float((ours.float() - theirs).abs().max() / theirs.abs().max())
        case = f"attention, {heads} heads of {dim}, {dtype} over {kept}, blocks of {block_size}"
        case += f", window {window}, soft cap {cap:g}{', ALiBi' if alibi else ''}"
        print(f"{'ok' if error <= _TOLERANCE else 'FAILED':8}{case}", flush=True)
        if not error <= _TOLERANCE:
            problems.append(f"{case}: differs by {error:.3g} of the largest value")
    return problems


def _bits_of_attention() -> list[str]:
    """Whether a token's bits are the same in a chunk, alone and among other rows."""
    problems = []
    for heads, kv_heads, dim in ((32, 8, 128), (8, 1, 128), (9, 3, 64), (8, 4, 256)):
        torch.manual_seed(_SEED)
        length, blocks = 1500, 94
        q = torch.randn(length, heads, dim, device=_DEVICE, dtype=DTYPE)
        caches = torch.randn(2, blocks, 16, kv_heads, dim, device=_DEVICE, dtype=DTYPE)
        table = torch.randperm(blocks, device=_DEVICE).int()
        whole = _attend(q, caches, table, [(0, length)])
        chunk = _attend(q, caches, table, [(600, 730)])
        token = _attend(q, caches, table, [(1100, 1101)])
        among = _attend(q, caches, table, [(0, 40), (1499, 1500)])
        for name, same in (
            ("a chunk", torch.equal(chunk, whole[600:730])),
            ("one token", torch.equal(token, whole[1100:1101])),
            ("one among others", torch.equal(among[40:], whole[1499:])),
        ):
            case = f"bits of attention, {heads}/{kv_heads} heads of {dim}, {name}"
            print(f"{'ok' if same else 'FAILED':8}{case}", flush=True)
            if not same:
                problems.append(f"{case}: other bits than in the whole prompt")
    return problems


def bits_of_products(width: int = 4096, inner: int = 4096) -> list[str]:
    """Whether a row's bits are the same beside any number of others, whose tiles differ."""
    problems = []
    torch.manual_seed(_SEED)
    weight = torch.randn(width, inner, device=_DEVICE)
    x = torch.randn(_ROWS[-1], inner, device=_DEVICE, dtype=DTYPE)
    for name, kind in KINDS.items():
        packed: Any = PackedQuantised.of(quantise(weight, kind))
        found = {rows: kernels.OPS["linear"](x[:rows], packed, None) for rows in _ROWS}
        for rows, some in found.items():
            same = torch.equal(some, found[_ROWS[-1]][:rows])
            case = f"bits of {name}, {rows} rows beside {_ROWS[-1]}"
            print(f"{'ok' if same else 'FAILED':8}{case}", flush=True)
            if not same:
                problems.append(f"{case}: others")
    return problems


def _attend(
    q: torch.Tensor,
    caches: torch.Tensor,
    table: torch.Tensor,
    chunks: list[tuple[int, int]],
    window: int = 0,
    soft_cap: float = 0.0,
    slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of some chunks (first, end) of one sequence, each as a row of its own."""
    counts = [end - first for first, end in chunks]
    step = SimpleNamespace(  # the fields of AttentionMetadata
        cu_query_lens=torch.tensor([0, *counts]).cumsum(0).int().to(_DEVICE),
        context_lens=torch.tensor([end for _, end in chunks]).int().to(_DEVICE),
        block_tables=table.expand(len(chunks), -1).contiguous(),
        max_query_len=max(counts),
        max_context_len=max(end for _, end in chunks),
    )
    rows = torch.cat([q[first:end] for first, end in chunks])
    scale = q.shape[2] ** -0.5
    kind = (window, soft_cap, slopes)
    return kernels.OPS["paged_attention"](rows, *caches.unbind(0), step, scale, *kind)


# ------------------------------------------------------------------ time


def measure(model: str, seconds: float) -> list[dict[str, Any]]:
    """A record for each case. torch.compile, which takes longest, comes last, and only until the
    time is up."""
    end, cases = time.monotonic() + seconds, cases_here(model)
    records: list[dict[str, Any]] = []
    for case in cases:
        record: dict[str, Any] = {
            "op": case.op,
            "model": case.model,
            "step": case.step,
            "bytes": case.nbytes,
            "operations": case.operations,
            "seconds": seconds_of(case),
        }
        if _has_reference(case):
            with _reference_ops():
                record["reference_seconds"] = seconds_of(case)
        records.append(record)
        print(json.dumps(record), flush=True)
    for case, record in zip(cases, records, strict=True):
        if time.monotonic() > end:
            print(f"{seconds:.0f} s are up: torch.compile has not been tried on {case.name} and on")
            break
        if _has_reference(case):
            with _reference_ops():
                record["compiled_seconds"] = seconds_of(case, torch.compile)
    return records


def seconds_of(
    case: Case, wrap: Callable[[Callable[[], Any]], Callable[[], Any]] | None = None
) -> Any:
    """Seconds that the GPU takes for a call, the median; None where it cannot run."""
    try:
        run = _made(case)
        return seconds_of_call(wrap(run) if wrap else run)
    except Exception as error:  # torch.compile does not take everything; the figure is left out
        print(f"{case.name}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
        return None


@contextmanager
def never_waiting() -> Iterator[None]:
    """In the block PyTorch raises RuntimeError where the host would wait for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def seconds_of_call(run: Callable[[], Any]) -> float:
    """The median of its replays as a CUDA graph, as steps replay it: else a short one would be
    timed by how fast the host starts it. A call in which the host waits, which no graph can hold,
    is timed as it is."""
    run()
    try:
        with never_waiting():  # a capture that failed would leave the random numbers' state behind
            run()
    except RuntimeError:
        return triton.testing.do_bench(run, return_mode="median") / 1e3
    return triton.testing.do_bench_cudagraph(run, rep=_REPLAYED, return_mode="median") / 1e3


def page(records: list[dict[str, Any]], name: str) -> str:
    """docs/gpu.md. The share of the floor needs the GPU's published peaks, see report.GPUS."""
    gpu = next((gpu for gpu in GPUS if gpu.name in name), None)
    lines = [
        "# The kernels on a GPU",
        "",
        f"Written by `make bench-gpu` on {name}, torch {torch.__version__}, triton "
        f"{triton.__version__}.",
        "Medians in µs of replays as CUDA graphs; PyTorch's operations in which the host waits for",
        "the GPU are timed as they are. The floor is [the roofline page](roofline.md)'s.",
        "",
        "| operation | model | step | Triton | PyTorch | torch.compile | floor / Triton |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    for record in records:
        times = [record.get(f"{kind}seconds") for kind in ("", "reference_", "compiled_")]
        share = ""
        if gpu and times[0]:
            floor = max(
                record["bytes"] / gpu.bytes_per_second,
                record["operations"] / gpu.operations_per_second,
            )
            share = f"{floor / times[0]:.2f}"
        cells = " | ".join("" if value is None else f"{value * 1e6:.1f}" for value in times)
        lines.append(
            f"| {record['op']} | {record['model']} | {record['step']} | {cells} | {share} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("check", "time"))
    parser.add_argument("--model", default=MODELS[0].name, help='of the shapes; "" for all')
    parser.add_argument("--seconds", type=float, default=480, help="that `time` may take")
    options = parser.parse_args()
    name = gpu_name()
    if not name:
        print("there is no GPU that PyTorch can use here (or TRITON_INTERPRET is set)")
        return 2
    if options.command == "check":
        problems = check(options.model)
        print("\n".join(problems) or f"all kernels are right on {name}")
        return 1 if problems else 0
    records = measure(options.model, options.seconds)
    content = {"gpu": name, "torch": torch.__version__, "triton": triton.__version__}
    (_DOCS / "gpu.json").write_text(json.dumps({**content, "cases": records}, indent=1) + "\n")
    (_DOCS / "gpu.md").write_text(page(records, name), encoding="utf-8")
    print(f"wrote {_DOCS / 'gpu.json'} and {_DOCS / 'gpu.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
