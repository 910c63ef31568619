"""Times each operation of a back end beside the reference: `python -m headgate.kernels.benchmark`.

The two run in turn, so that a machine that drifts or is shared drifts for both; the fastest run of
many is printed, since other programs only ever add time. Shapes are those of the embedded model.
Whole steps and servers are measured elsewhere.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from types import SimpleNamespace
from typing import Any

import torch

from headgate.kernels import ops
from headgate.quant_kinds import KINDS

_HIDDEN, _MLP, _VOCABULARY = 576, 1536, 49152
_HEADS, _KV_HEADS, _DIM, _BLOCK = 9, 3, 64, 16
_MATRICES = {
    "qkv": (960, _HIDDEN),
    "o": (_HIDDEN, _HIDDEN),
    "gate_up": (2 * _MLP, _HIDDEN),
    "down": (_HIDDEN, _MLP),
    "vocabulary": (_VOCABULARY, _HIDDEN),
}
# More weights than caches hold, as between two visits to the same layer of a model.
_COLD_BYTES = 100_000_000


Call = Callable[[int], object]  # the number of the call


@dataclass(frozen=True)
class Case:
    """`prepare` makes the call for the back end in use. `flops`, `nbytes`: its least."""

    name: str
    prepare: Callable[[], Call]
    flops: float
    nbytes: float


def linear_cases(dtype: torch.dtype, quantize: str) -> Iterator[Case]:
    weight_bytes = KINDS[quantize].bytes_per_weight if quantize else dtype.itemsize
    for name, (columns, inner) in _MATRICES.items():
        for rows in (1, 8, 32, 128, 512) if columns < 10_000 else (1, 8, 32):
            yield Case(
                f"linear {name} {columns}x{inner} rows {rows}",
                partial(_linear, (columns, inner), rows, dtype, quantize),
                2.0 * rows * columns * inner,
                columns * inner * weight_bytes,
            )


def _linear(size: tuple[int, int], rows: int, dtype: torch.dtype, quantize: str) -> Call:
    columns, inner = size
    matrix, x = torch.randn(columns, inner).to(dtype).float(), torch.randn(rows, inner)
    copies = max(1, _COLD_BYTES // (columns * inner * 4))
    weights = [ops.pack_linear(matrix.clone(), dtype, quantize) for _ in range(copies)]
    return lambda i: ops.linear(x, weights[i % copies])


def attention_cases(dtype: torch.dtype) -> Iterator[Case]:
    for rows, query, context in (
        (1, 1, 16), (1, 1, 300), (1, 1, 2000), (32, 1, 300), (1, 128, 128), (1, 512, 512),
        (1, 128, 2000),
    ):  # fmt: skip
        pairs = rows * (query * context - query * (query - 1) / 2)
        yield Case(
            f"attention rows {rows} x {query} at {context}",
            partial(_attention, rows, query, context),
            4.0 * pairs * _HEADS * _DIM,
            rows * context * _KV_HEADS * _DIM * 8.0,
        )


def _attention(rows: int, query: int, context: int) -> Call:
    blocks = -(-context // _BLOCK)
    step: Any = SimpleNamespace(  # the fields of AttentionMetadata
        cu_query_lens=(torch.arange(rows + 1) * query).int(),
        context_lens=torch.full((rows,), context).int(),
        block_tables=torch.randperm(rows * blocks).view(rows, blocks).int(),
        slot_mapping=torch.zeros(rows * query, dtype=torch.int64),
        max_query_len=query,
        max_context_len=context,
    )
    k_cache, v_cache = torch.randn(2, rows * blocks, _BLOCK, _KV_HEADS, _DIM)
    q = torch.randn(rows * query, _HEADS, _DIM)
    return lambda i: ops.paged_attention(q, k_cache, v_cache, step, 0.125)


def other_cases(dtype: torch.dtype) -> Iterator[Case]:
    for rows in (1, 32, 512):
        for name, floats in (
            ("rms_norm", 2 * _HIDDEN),
            ("rms_norm_residual", 4 * _HIDDEN),
            ("silu_and_mul", 3 * _MLP),
            ("rotary", 2 * (_HEADS + _KV_HEADS) * _DIM),
            ("write_kv", 4 * _KV_HEADS * _DIM),
        ):
            yield Case(f"{name} rows {rows}", partial(_other, name, rows), 0.0, 4.0 * rows * floats)


def _other(name: str, rows: int) -> Call:
    x, weight, wide = torch.randn(rows, _HIDDEN), torch.randn(_HIDDEN), torch.randn(rows, 2 * _MLP)
    q, k = torch.randn(rows, _HEADS, _DIM), torch.randn(rows, _KV_HEADS, _DIM)
    at, table = torch.arange(rows), torch.randn(rows, _DIM)
    k_cache, v_cache = torch.randn(2, rows // _BLOCK + 1, _BLOCK, _KV_HEADS, _DIM)
    calls: dict[str, Call] = {
        "rms_norm": lambda i: ops.rms_norm(x, weight, 1e-5),
        "rms_norm_residual": lambda i: ops.rms_norm_residual(x, x.clone(), weight, 1e-5),
        "silu_and_mul": lambda i: ops.silu_and_mul(wide),
        "rotary": lambda i: ops.rotary_embedding(q, k, at, table),
        "write_kv": lambda i: ops.write_kv(k, k, k_cache, v_cache, at),
    }
    return calls[name]


def fastest(run: Call, seconds: float) -> float:
    """Seconds of the fastest of at least 3 calls."""
    best, calls, end = float("inf"), 0, time.perf_counter() + seconds
    while calls < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        run(calls)
        best = min(best, time.perf_counter() - start)
        calls += 1
    return best


def measure(options: argparse.Namespace) -> None:
    """Prints a line for each case whose name holds `options.only`."""
    backend, dtype = options.kernels, getattr(torch, options.dtype)
    print(f"{'':44}{backend:>12}{'reference':>12}{'ratio':>8}{'GFLOP/s':>9}{'GB/s':>7}")
    linear = linear_cases(dtype, options.quantize)
    for case in chain(linear, attention_cases(dtype), other_cases(dtype)):
        if options.only not in case.name:
            continue
        calls = {}
        for name in (backend, "reference"):
            ops.use(name)
            calls[name] = case.prepare()
        times = dict.fromkeys(calls, float("inf"))
        for name in [*calls] * 3:
            ops.use(name)
            times[name] = min(times[name], fastest(calls[name], options.seconds / 6))
        ours, theirs = times[backend], times["reference"]
        print(
            f"{case.name:44}{ours * 1e6:9.1f} us{theirs * 1e6:9.1f} us{theirs / ours:8.1f}"
            f"{case.flops / ours / 1e9:9.1f}{case.nbytes / ours / 1e9:7.1f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernels", default="cpu", choices=ops.BACKENDS, help="back end to time")
    parser.add_argument("--dtype", default="bfloat16", help="how weights are stored")
    parser.add_argument("--quantize", default="", choices=("", *KINDS), help="kind of weights")
    parser.add_argument("--threads", type=int, default=0, help="0: what torch would use")
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument("--seconds", type=float, default=0.6, help="for each case")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    measure(options)


if __name__ == "__main__":
    main()
