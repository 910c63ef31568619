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
from dataclasses import asdict, dataclass

import torch

from headgate.bench.roofline import Roofline, measure
from headgate.bench.server import free_port
from headgate.kernels import cpu, ops
from headgate.launcher.embedded_model import ensure_embedded_model
from headgate.proto.messages import NewRow, RowSampling, StepPlan
from headgate.shard.config import DTYPES, MATMUL_PRECISIONS, ShardConfig, ShardIdentity
from headgate.shard.distributed import Group, init_group, single_group
from headgate.shard.model_runner import ModelRunner
from headgate.shard.models.registry import load_model
from headgate.shard.recorded_model import RecordedModel

_BLOCK = 16
_TIMEOUT = 60.0  # seconds that a shard waits for another
_CHUNK = 256  # tokens of the steps that compute prompts which aren't measured
_MOST_TOKENS = 512
_BYTES = {0: 4.0, 1: 2.0, 2: 2.0, 3: 2.0}  # of a weight, by its code in kernels.h
_ROUNDED = 3  # the code of weights whose inputs are rounded
_QUANTISED_BYTES = {0: 1.0, 1: 1.0, 2: 0.625}  # in quantised.h, int4 with its groups' scales


@dataclass(frozen=True, slots=True)
class Case:
    """A step of `rows` rows computing `count` tokens each, up to position `context`."""

    rows: int
    count: int
    context: int

    @property
    def name(self) -> str:
        if self.count == 1:
            return f"{self.rows} rows decode at {self.context} positions"
        return f"a chunk of {self.count} tokens up to position {self.context}"


CASES = (
    Case(1, 1, 200),
    Case(8, 1, 200),
    Case(32, 1, 200),
    Case(128, 1, 60),
    Case(1, 1, 1500),
    Case(1, 128, 128),
    Case(1, 256, 1500),
)


@dataclass(frozen=True, slots=True)
class Stored:
    """How weights, keys and values are kept; as the fields of ShardConfig."""

    dtype: str
    quantize: str
    matmul_precision: str
    kv_cache_dtype: str


@dataclass(slots=True)
class Line:
    """Calls of one kind in a step."""

    calls: int = 0
    microseconds: float = 0.0
    floor: float = 0.0


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
            num_blocks=2048,
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

    def _step(self, **fields: object) -> float:
        """Seconds that it took."""
        self._sequence += 1
        plan = StepPlan(epoch=1, sequence=self._sequence, **fields)  # type: ignore[arg-type]
        began = time.perf_counter()
        refused = self.runner.step(plan).refused
        assert not refused, refused
        return time.perf_counter() - began

    def _prepare(self, case: Case, room: int) -> None:
        """Rows whose next step is the case's."""
        blocks = -(-(case.context + room) // _BLOCK)
        sampling = RowSampling(max_new_tokens=room, ignore_eos=True)
        rows = [
            NewRow(
                row,
                [(7 * at + row) % self.model.config.vocab_size for at in range(case.context)],
                sampling,
                block_ids=range(row * blocks, (row + 1) * blocks),
            )
            for row in range(case.rows)
        ]
        self._step(reset=True, new_rows=rows)
        for row in range(case.rows):
            left = case.context - (case.count if case.count > 1 else 0)
            while left:
                self._step(rows=[row], counts=[min(left, _CHUNK)])
                left -= min(left, _CHUNK)

    def measure(self, case: Case, repeats: int) -> tuple[float, dict[str, Line]]:
        """(milliseconds of a step, its calls by kind): means over `repeats` steps."""
        programs = self._programs
        if case.count == 1:
            self._prepare(case, repeats + 1)
        totals = [program.time_calls() for program in programs]
        seconds = 0.0
        for _ in range(repeats):
            if case.count > 1:
                before = [total.copy() for total in totals]
                self._prepare(case, 1)
                for total, old in zip(totals, before, strict=True):
                    total[:] = old
            seconds += self._step(rows=range(case.rows), counts=[case.count] * case.rows)
        # Of a step, and of the logits that did not come with it.
        sampled = min(case.rows, self._most_logits)
        sizes = ((case.rows * case.count, case.rows, sampled), (case.rows - sampled,))
        lines: dict[str, Line] = defaultdict(Line)
        for program, total, size in zip(programs, totals, sizes, strict=True):
            if not size[-1]:
                continue
            for index, call in enumerate(program.calls):
                name, floor = self._floor(call.name, program.arguments(index, size), case)
                line = lines[name]
                line.calls += 1
                line.microseconds += total[index] / repeats / 1e3
                line.floor += floor
        return seconds / repeats * 1e3, lines

    def _floor(self, name: str, arguments: list[int], case: Case) -> tuple[str, float]:
        """(kind of the call, microseconds below which it can't be)."""
        kind = name.removeprefix("hg_").replace("_", " ")
        if name in ("hg_linear", "hg_linear_quantised"):
            rows, inner, code, columns = (arguments[i] for i in (1, 2, 5, 6))
            sizes = _BYTES if name == "hg_linear" else _QUANTISED_BYTES
            best = 0.0
            if name == "hg_linear" and code == _ROUNDED:
                best = self.roofline.bf16_gflops
            elif name != "hg_linear" and code != 1:
                best = self.roofline.vnni_gops
            rate = best or self.roofline.fma_gflops
            work = 2.0 * rows * columns * inner / rate / 1e3
            return f"{kind} {columns} x {inner}", max(
                work, sizes[code] * columns * inner / self.roofline.memory_gb_s / 1e3
            )
        if name == "hg_paged_attention":
            model = self.model
            pairs = case.rows * sum(case.context - case.count + 1 + at for at in range(case.count))
            work = 4.0 * pairs * model.num_local_heads * model.head_dim
            positions = case.rows * case.context / self.runner.kv_layout.block_size
            read = positions * self.runner.kv_layout.bytes_per_block / model.num_layers
            rates = self.roofline.fma_gflops, self.roofline.memory_gb_s
            return kind, max(work / rates[0], read / rates[1]) / 1e3
        return kind, 0.0


def table(case: Case, milliseconds: float, lines: dict[str, Line]) -> Iterator[str]:
    """The case in Markdown."""
    yield f"### {case.name[0].upper()}{case.name[1:]}: {milliseconds:.2f} ms\n"
    yield "| calls | kind | ms | share | floor, ms | of the floor |"
    yield "|---|---|---|---|---|---|"
    whole = milliseconds * 1e3
    for name, line in sorted(lines.items(), key=lambda item: -item[1].microseconds):
        best = f"{line.floor / 1e3:.2f} | {line.floor / line.microseconds:.0%}"
        yield (
            f"| {line.calls} | {name} | {line.microseconds / 1e3:.2f} "
            f"| {line.microseconds / whole:.1%} | {best if line.floor else '|'} |"
        )
    rest = whole - sum(line.microseconds for line in lines.values())
    yield f"| | Python: inputs, sampling, bookkeeping | {rest / 1e3:.2f} | {rest / whole:.1%} | | |"
    floor = sum(line.floor for line in lines.values())
    yield f"| | all | {milliseconds:.2f} | | {floor / 1e3:.2f} | {floor / whole:.0%} |\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m headgate.bench.step_profile", description=__doc__
    )
    parser.add_argument("--model", default="", help="a checkpoint directory; default: the embedded")
    parser.add_argument("--dtype", default="bfloat16", help="how weights are stored")
    parser.add_argument("--quantize", default="", help="as of headgate serve")
    parser.add_argument("--matmul-precision", default="highest", choices=MATMUL_PRECISIONS)
    parser.add_argument(
        "--kv-cache-dtype",
        default="",
        choices=["", *DTYPES],
        help="float32; float16 with quantised weights",
    )
    parser.add_argument("--threads", type=int, default=0, help="of a shard; default: a fair share")
    parser.add_argument("--num-shard", type=int, default=1, help="shards to split the model over")
    parser.add_argument(
        "--repeats",
        type=int,
        default=15,
        help="steps of each case that decodes; a quarter of it for chunks",
    )
    options = parser.parse_args()
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
        for rank, other in enumerate(others, 1):
            print(f"## Shard {rank}\n\n{other.communicate()[0].decode()}")
    finally:
        for other in others:
            other.kill()
            other.wait()


def _profile(options: argparse.Namespace, threads: int) -> None:
    roofline = measure(threads)
    group = init_group("cpu", _TIMEOUT)
    model_path = options.model or str(ensure_embedded_model())
    narrow = bool(options.quantize) or options.matmul_precision != "highest"
    stored = Stored(
        options.dtype,
        options.quantize,
        options.matmul_precision,
        options.kv_cache_dtype or ("float16" if narrow else "float32"),
    )
    profiler = Profiler(model_path, stored, roofline, group)
    print(
        f"{threads} threads, keys and values in {stored.kv_cache_dtype}; at best "
        f"{roofline.fma_gflops:.0f} GFLOP/s, {roofline.bf16_gflops:.0f} with pairs of bfloat16, "
        f"{roofline.vnni_gops:.0f} int8 GOP/s, {roofline.memory_gb_s:.1f} GB/s from memory.\n"
    )
    for case in CASES:
        repeats = options.repeats if case.count == 1 else max(1, options.repeats // 4)
        print("\n".join(table(case, *profiler.measure(case, repeats))), flush=True)
    group.close()


if __name__ == "__main__":
    main()
