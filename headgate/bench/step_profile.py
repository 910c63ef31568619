"""`python -m headgate.bench.step_profile`: where a CPU step's time goes, against its floor.

Steps are computed in this process by a ModelRunner, without a server, and their recorded calls are
timed. The floor of a call is the time that the machine's best multiply-add rate, or reading what
must be read (weights; keys and values) from memory, would take, measured beside it (roofline.py).
With `--num-shard` each shard is a process that takes the same steps; what a shard waits for the
others is in its sums. Prints Markdown.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import torch

from headgate.bench.roofline import Roofline, measure
from headgate.bench.server import free_port
from headgate.bench.step_tables import (
    CASES,
    GROWTH,
    Case,
    Line,
    Step,
    calls_table,
    growth_table,
    kinds_table,
)
from headgate.kernels import cpu, ops
from headgate.launcher.embedded_model import ensure_embedded_model
from headgate.proto.messages import NewRow, RowSampling, StepPlan
from headgate.quant_kinds import cpu_kv_dtype
from headgate.shard.config import DTYPES, ShardConfig, ShardIdentity
from headgate.shard.distributed import Group, init_group, single_group
from headgate.shard.model_runner import ModelRunner
from headgate.shard.models.registry import load_model
from headgate.shard.recorded_model import RecordedModel

_BLOCK = 16
_TIMEOUT = 60.0  # seconds that a shard waits for another
_CHUNK = 256  # tokens of the prompt whose keys and values all blocks get
_COPIED = 128  # blocks at a time
_MOST_TOKENS = 512  # of a step
_NUM_BLOCKS = 2240  # of the cache: 32 rows of 1000 positions, and a hundred steps
_BYTES = {0: 4.0, 1: 2.0, 2: 2.0, 3: 2.0}  # of a weight, by its code in kernels.h
_BFLOAT16, _SCALED_BYTES = 1, 5  # their codes there
_ROUNDED = 3  # the code of weights whose inputs are rounded
_QUANTISED_BYTES = {0: 1.0, 1: 1.0, 2: 0.5625}  # in quantised.h, int4 with its groups' scales


@dataclass(frozen=True, slots=True)
class Stored:
    """How weights, keys and values are kept; as the fields of ShardConfig."""

    dtype: str
    quantize: str
    matmul_precision: str
    kv_cache_dtype: str


def _stored(dtype: str, quantize: str = "", precision: str = "highest") -> Stored:
    """As a CPU serves it, with heads of most models."""
    return Stored(dtype, quantize, precision, cpu_kv_dtype(quantize, precision, 64))


KINDS = {
    "fp32": _stored("float32"),
    "bf16": _stored("bfloat16"),
    "bf16-medium": _stored("bfloat16", precision="medium"),
    "int8": _stored("bfloat16", "int8"),
    "int8-weight-only": _stored("bfloat16", "int8-weight-only"),
    "int4": _stored("bfloat16", "int4"),
}


class Profiler:
    """A model whose steps are replayed and timed."""

    def __init__(
        self, model_path: str, stored: Stored, roofline: Roofline, group: Group | None = None
    ) -> None:
        threads = roofline.threads
        torch.set_num_threads(threads)
        if ops.use("", "cpu") != "cpu":
            raise SystemExit("the C++ kernels are not built")
        cpu.set_num_threads(threads)
        config = ShardConfig(
            model_path=model_path,
            device="cpu",
            num_threads=threads,
            max_batch_prefill_tokens=_MOST_TOKENS,
            max_batch_size=128,
            max_total_tokens=2048,
            addresses=("unix:unused",),
            block_size=_BLOCK,
            num_blocks=_NUM_BLOCKS,
            **asdict(stored),
        )
        group = group or single_group()
        model = load_model(
            model_path,
            dtype=stored.dtype,
            device="cpu",
            group=group,
            quantize=stored.quantize,
            precision=stored.matmul_precision,
        )
        identity = ShardIdentity(group.rank, group.world_size, 1)
        self.runner = ModelRunner(model, group, config, identity)
        self.runner.record()
        if not isinstance(self.runner.recorded, RecordedModel):
            raise SystemExit("this model's steps are not replayed; the log says why")
        self._programs = self.runner.recorded.programs
        self._most_logits = self.runner.recorded.most_logits
        self.runner.allocate(config.num_blocks)
        self.model = model
        self.roofline = roofline
        self._sequence = 0
        self._fill_cache(config.num_blocks)

    def _step(self, **fields: object) -> float:
        """Seconds that it took."""
        self._sequence += 1
        plan = StepPlan(epoch=1, sequence=self._sequence, **fields)  # type: ignore[arg-type]
        began = time.perf_counter()
        refused = self.runner.step(plan).refused
        assert not refused, refused
        return time.perf_counter() - began

    def _fill_cache(self, num_blocks: int) -> None:
        """Gives all blocks keys and values: those of one prompt, over and over. What was never
        written takes no memory, and would be read faster."""
        own = range(_CHUNK // _BLOCK)
        ids = [7 * at % self.model.config.vocab_size for at in range(_CHUNK)]
        steps = -(-num_blocks // _COPIED)
        sampling = RowSampling(max_new_tokens=1 + steps, ignore_eos=True)
        room = -(-steps // _BLOCK)
        row = NewRow(0, ids, sampling, block_ids=range(len(own) + room))
        self._step(reset=True, new_rows=[row], rows=[0], counts=[_CHUNK])
        for first in range(len(own), num_blocks, _COPIED):
            blocks = range(first, min(first + _COPIED, num_blocks))
            copies = [(own[block % len(own)], block) for block in blocks]
            self._step(copies=copies, rows=[0], counts=[1])

    def _prepare(self, case: Case, room: int) -> None:
        """Rows whose next step is the case's; the keys and values before it are as they are."""
        blocks = -(-(case.context + room) // _BLOCK)
        sampling = RowSampling(max_new_tokens=room, ignore_eos=True)
        known = case.context + (1 if case.count == 1 else 0)
        rows = [
            NewRow(
                row,
                [(7 * at + row) % self.model.config.vocab_size for at in range(known)],
                sampling,
                num_computed_tokens=known - case.count,
                block_ids=range(row * blocks, (row + 1) * blocks),
            )
            for row in range(case.rows)
        ]
        self._step(reset=True, new_rows=rows)

    def measure(self, case: Case, repeats: int) -> Step:
        """Means over `repeats` steps, after one that isn't counted."""
        programs = self._programs
        totals = [program.time_calls() for program in programs]
        seconds = 0.0
        for number in range(repeats + 1):
            if number == 0 or case.count > 1:
                self._prepare(case, repeats + 2)
            if number == 1:
                seconds = 0.0
                for total in totals:
                    total[:] = 0
            seconds += self._step(rows=range(case.rows), counts=[case.count] * case.rows)
        # Of a step, and of the logits that did not come with it.
        sampled = min(case.rows, self._most_logits)
        step = (case.rows * case.count, case.rows, case.rows, sampled, 1)
        sizes = (step, (case.rows - sampled, 1))
        lines: dict[str, Line] = defaultdict(Line)
        for program, total, size in zip(programs, totals, sizes, strict=True):
            if not size[-2]:
                continue
            for index, call in enumerate(program.calls):
                name, floor = self._floor(call.name, program.arguments(index, size), case)
                line = lines[name]
                line.calls += 1
                line.microseconds += total[index] / repeats / 1e3
                line.floor += floor
        return Step(seconds / repeats * 1e3, lines)

    def _floor(self, name: str, arguments: list[int], case: Case) -> tuple[str, float]:
        """(kind of the call, microseconds below which it can't be)."""
        kind = name.removeprefix("hg_").replace("_", " ")
        if name == "hg_linear_likely":  # by int8 weights, but for a few columns
            largest = arguments[9]
            name = "hg_linear_quantised" if largest else "hg_linear"
            arguments[5] = 0 if largest else arguments[5]
        quantised = name.endswith("_quantised")
        if name in ("hg_linear", "hg_linear_quantised"):
            rows, inner, code, columns = (arguments[i] for i in (1, 2, 5, 6))
            floor = self._product_floor(quantised, code, rows, columns, inner)
            return f"{kind} {columns} x {inner}", floor
        if name in ("hg_gated_mlp", "hg_gated_mlp_quantised"):
            rows, inner, code, middle, columns = (arguments[i] for i in (1, 2, 9, 10, 14))
            floor = self._product_floor(quantised, code, rows, 2 * middle, inner)
            floor += self._product_floor(quantised, code, rows, columns, middle)
            return f"{kind} {columns} x {middle} x {inner}", floor
        if name == "hg_paged_attention":
            model = self.model
            pairs = case.rows * sum(case.context - case.count + 1 + at for at in range(case.count))
            work = 4.0 * pairs * model.num_local_heads * model.head_dim
            positions = case.rows * case.context / self.runner.kv_layout.block_size
            read = positions * self.runner.kv_layout.bytes_per_block / model.num_layers
            dtype, rounded = arguments[7], arguments[18]
            rates = {_BFLOAT16: self.roofline.bf16_gflops, _SCALED_BYTES: self.roofline.vnni_gops}
            # Where there is no such instruction a pair is two multiply-adds.
            rate = (rounded and rates.get(dtype)) or self.roofline.fma_gflops
            return kind, max(work / rate, read / self.roofline.memory_gb_s) / 1e3
        return kind, 0.0

    def _product_floor(
        self, quantised: bool, code: int, rows: int, columns: int, inner: int
    ) -> float:
        """Microseconds of a product with weights of such a code, by arithmetic or by memory."""
        line = self.roofline
        best = line.vnni_gops if quantised and code != 1 else 0.0
        if not quantised and code == _ROUNDED:
            best = line.bf16_gflops
        sizes = _QUANTISED_BYTES if quantised else _BYTES
        work = 2.0 * rows * columns * inner / (best or line.fma_gflops)
        return max(work, sizes[code] * columns * inner / line.memory_gb_s) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m headgate.bench.step_profile", description=__doc__
    )
    parser.add_argument("--model", default="", help="a checkpoint directory; default: the embedded")
    parser.add_argument(
        "--kinds", default="bf16", help=f"of weights: {', '.join(KINDS)} (default: %(default)s)"
    )
    parser.add_argument(
        "--kv-cache-dtype",
        default="",
        choices=["", *DTYPES, "int8"],
        help="default: as a CPU serves the kind",
    )
    parser.add_argument("--threads", type=int, default=0, help="of a shard; default: a fair share")
    parser.add_argument("--num-shard", type=int, default=1, help="shards to split the model over")
    parser.add_argument(
        "--tables",
        default="calls,growth",
        help="calls: some steps call by call; growth: what a step grows with (default: both)",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=15,
        help="steps of each case; a quarter of it for prompts and from 64 rows on",
    )
    options = parser.parse_args()
    for name, known in (("kinds", KINDS), ("tables", ("calls", "growth"))):
        chosen = getattr(options, name).split(",")
        if unknown := set(chosen) - set(known):
            parser.error(f"--{name}: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
        setattr(options, name, chosen)
    threads = options.threads or max(1, torch.get_num_threads() // options.num_shard)
    torch.set_num_threads(threads)
    with _others(options.num_shard):
        _profile(options, threads)


@contextmanager
def _others(num_shard: int) -> Iterator[None]:
    """The other ranks, in the first one; each is this command again and prints its own tables."""
    if num_shard == 1 or "RANK" in os.environ:
        yield
        return
    group = {"WORLD_SIZE": str(num_shard), "MASTER_PORT": str(free_port()), "RANK": "0"}
    os.environ |= group
    command = [sys.executable, "-m", "headgate.bench.step_profile", *sys.argv[1:]]
    others = [
        subprocess.Popen(command, env=os.environ | {"RANK": str(rank)}, stdout=subprocess.PIPE)
        for rank in range(1, num_shard)
    ]
    try:
        yield
        for other in others:
            print(other.communicate()[0].decode())
    finally:
        for other in others:
            other.kill()
            other.wait()


def _profile(options: argparse.Namespace, threads: int) -> None:
    roofline = measure(threads)
    group = init_group("cpu", _TIMEOUT)
    model_path = options.model or str(ensure_embedded_model())
    where = f", shard {group.rank} of {group.world_size}" if group.world_size > 1 else ""
    print(
        f"{threads} threads{where}; at best {roofline.fma_gflops:.0f} GFLOP/s, "
        f"{roofline.bf16_gflops:.0f} with pairs of bfloat16, {roofline.vnni_gops:.0f} int8 GOP/s, "
        f"{roofline.memory_gb_s:.1f} GB/s from memory; a cache line from core to core takes "
        f"{roofline.core_to_core_ns:.0f} ns.\n"
    )
    found: dict[str, dict[Case, Step]] = {}
    for kind in options.kinds:
        stored = KINDS[kind]
        if options.kv_cache_dtype:
            stored = replace(stored, kv_cache_dtype=options.kv_cache_dtype)
        print(f"## {kind} weights, keys and values in {stored.kv_cache_dtype}{where}\n")
        profiler = Profiler(model_path, stored, roofline, group)
        found[kind] = {}
        for text in _tables(profiler, options, found[kind]):
            print(text, flush=True)
        del profiler  # its model, before the next one
    if len(found) > 1:
        print("\n".join(kinds_table(found)))
    group.close()


def _tables(
    profiler: Profiler, options: argparse.Namespace, found: dict[Case, Step]
) -> Iterator[str]:
    """Of one kind of weights, as they are measured; the steps go into `found`."""

    def measured(case: Case) -> Step:
        if case not in found:
            few = case.count > 1 or case.rows > 32
            repeats = max(1, options.repeats // 4) if few else options.repeats
            found[case] = profiler.measure(case, repeats)
        return found[case]

    if "calls" in options.tables:
        for case in CASES:
            yield "\n".join(calls_table(case, measured(case)))
    if "growth" in options.tables:
        for title, cases in GROWTH.items():
            yield "\n".join(growth_table(title, [(case, measured(case)) for case in cases]))


if __name__ == "__main__":
    main()
