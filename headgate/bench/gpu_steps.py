"""`python -m headgate.bench.gpu_steps check|time`: a shard's whole steps on this machine's GPU.

`check`: after a warm-up, steps begun ahead and replayed as CUDA graphs give the tokens of steps
that are neither, with PyTorch told to fail where the host would wait; collectives of NCCL with one
rank, in a graph too. `time`: decode steps of a Llama of 8 billion random weights (of 1 billion
where memory is small) at batch 1, 8, 64 and 256, with its weights as they are and quantised, as the
shard's service runs them, against the time that reading the weights and the keys and values takes
at the GPU's bandwidth; router and gateway, which run beside the shard, are not in it (`make
bench-host`). The figures go to docs/gpu.json and docs/gpu.md, beside those of the kernels. Both
need torch, triton and safetensors only, and no network.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

try:
    from headgate.proto import shard_pb2  # noqa: F401
except ImportError:  # a bare checkout: steps travel nowhere here, so their wire form is not needed
    sys.modules["headgate.proto.shard_pb2"] = types.ModuleType("headgate.proto.shard_pb2")

from headgate.kernels import ops
from headgate.kernels.triton import on_gpu
from headgate.kernels.triton.report import GPUS
from headgate.proto.messages import NewRow, RowSampling, StepPlan
from headgate.shard.config import ShardConfig, ShardIdentity
from headgate.shard.cuda_graphs import GraphedModel
from headgate.shard.device import CudaDevice, Device
from headgate.shard.distributed import Group, ProcessGroup, single_group
from headgate.shard.load_context import LoadContext
from headgate.shard.model_config import ModelConfig, parse_model_config
from headgate.shard.model_runner import ModelRunner
from headgate.shard.models.base import CausalLM
from headgate.shard.models.llama import LlamaForCausalLM
from headgate.shard.partition import make_partition
from headgate.shard.pending_step import PendingStep
from headgate.shard.weights import Weights

_DOCS = Path(on_gpu.__file__).resolve().parents[2] / "docs"
_BATCHES = (1, 8, 64, 256)
_KINDS = ("", "int8", "int4")  # of quantised weights; "": as they are
_BLOCK = 16
_CONTEXT = 1024  # positions of each row, fewer where memory is small
_STEPS, _WARM_STEPS = 40, 8
_GOAL = 1.15  # times the floor
_SEED = 5


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama's sizes."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False

    def config(self, positions: int) -> ModelConfig:
        fields: dict[str, Any] = {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": positions,
            "tie_word_embeddings": self.tied,
            "rope_theta": 500000.0,
        }
        return parse_model_config(fields, {})


LARGE = Shape("Llama-3-8B", 4096, 14336, 32, 32, 8, 128256)
SMALL = Shape("Llama-3.2-1B", 2048, 8192, 16, 32, 8, 128256, tied=True)
TINY = Shape("a tiny Llama", 256, 512, 2, 4, 2, 512)
_LARGE_BYTES = 24 << 30  # of memory that LARGE asks for


class RandomWeights(Weights):
    """Instead of a checkpoint: small random numbers of any shape asked for."""

    def _find_tensors(self) -> dict[str, Path]:
        return {}

    def _read(
        self, name: str, shape: Sequence[int], read: Callable[[Any], torch.Tensor]
    ) -> torch.Tensor:
        part = read(torch.empty(tuple(shape), device="meta"))
        return torch.randn(part.shape, device=self.device, dtype=self.dtype).mul_(0.02)


def make_runner(
    shape: Shape, device: Device, config: dict[str, Any], group: Group | None = None
) -> ModelRunner:
    """With its cache allocated. config: fields of ShardConfig; kernels must be chosen before."""
    group = group or single_group()
    fields: dict[str, Any] = {
        "model_path": "",
        "dtype": "bfloat16",
        "device": "cuda",
        "num_threads": 1,
        "max_batch_prefill_tokens": 2048,
        "max_batch_size": 256,
        "max_total_tokens": _CONTEXT + _STEPS + _WARM_STEPS + _BLOCK,
        "addresses": ("unix:unused",),
        "block_size": _BLOCK,
        "kv_cache_dtype": "bfloat16",
        **config,
    }
    sizes = ShardConfig(**fields)
    torch.manual_seed(_SEED)
    model_config = shape.config(sizes.max_total_tokens)
    weights = RandomWeights(
        "random", dtype=sizes.weight_dtype, device=sizes.device, quantize=sizes.quantize
    )
    partition = make_partition(model_config, group.world_size)
    context = LoadContext(model_config, weights, partition, group, sizes.max_total_tokens)
    model = LlamaForCausalLM(context)
    model.weight_bytes = weights.nbytes
    runner = ModelRunner(model, group, sizes, ShardIdentity(0, 1, 1), device)
    runner.record()
    return runner


def begun_ahead(runner: ModelRunner, plans: Iterator[StepPlan]) -> Iterator[list[int]]:
    """Each step's tokens, the next step being begun before, as the shard's service does."""
    before: PendingStep | None = None
    for plan in plans:
        step = runner.begin(plan)
        if before is not None:
            yield list(before.result().token_ids)
        before = step
    if before is not None:
        yield list(before.result().token_ids)


def make_rows(batch: int, context: int, room: int) -> list[NewRow]:
    """Greedy and sampled rows of `context` known tokens, all but one computed; room: for more."""
    blocks = -(-(context + room) // _BLOCK)
    return [
        NewRow(
            index,
            [1 + (index + place) % 200 for place in range(context)],
            RowSampling(room, temperature=float(index % 2), seed=index, ignore_eos=True),
            num_computed_tokens=context - 1,
            block_ids=range(index * blocks, (index + 1) * blocks),
        )
        for index in range(batch)
    ]


def _plans(rows: Sequence[NewRow], steps: int) -> Iterator[StepPlan]:
    ids, counts = range(len(rows)), [1] * len(rows)
    yield StepPlan(1, 1, reset=True, new_rows=rows, rows=ids, counts=counts)
    for sequence in range(2, steps + 1):
        yield StepPlan(1, sequence, rows=ids, counts=counts)


# ------------------------------------------------------------------ check


def check(
    device: Device,
    config: dict[str, Any],
    never_waiting: Callable[[], Any],
    rows: Sequence[NewRow],
) -> list[str]:
    """What is wrong. never_waiting: a context in which a wait of the host is an error."""
    problems, steps = [], rows[0].sampling.max_new_tokens - 1
    results = {}
    for graphs in ("0", "1,4,5"):
        runner = make_runner(TINY, device, {**config, "cuda_graphs": graphs})
        runner.warm_up(64, len(rows))  # as serving does before
        runner.allocate(200)
        results[f"step by step, --cuda-graphs {graphs}"] = [
            list(runner.step(plan).token_ids) for plan in _plans(rows, steps)
        ]
        plans = _plans(rows, steps)
        tokens, before = [], runner.begin(next(plans))
        for plan in plans:  # sizes are captured by now
            before.wait()
            with never_waiting():
                step = runner.begin(plan)
            tokens.append(list(before.result().token_ids))
            before = step
        results[f"begun ahead, --cuda-graphs {graphs}"] = [*tokens, list(before.result().token_ids)]
        runner.release()
    wanted = next(iter(results.values()))
    for name, found in results.items():
        ok = found == wanted and all(len(tokens) == len(rows) for tokens in found)
        print(f"{'ok' if ok else 'FAILED':8}tokens of steps {name}", flush=True)
        if not ok:
            problems.append(f"steps {name}: {found}, not {wanted}")
    return problems


def check_nccl() -> list[str]:
    """NCCL with the one rank there is, in and out of a graph."""
    import torch.distributed as dist

    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    group = ProcessGroup(0, 1)
    x = torch.randn(64, 128, device="cuda")
    graph_input = x.clone()

    def all_collectives(tensor: torch.Tensor) -> torch.Tensor:
        summed = group.broadcast(group.all_reduce(tensor.clone()))
        gathered = group.gather_to_rank0(summed, 1, [tensor.shape[1]])
        assert gathered is not None
        return gathered

    problems = []
    replay, result = CudaDevice().capture(lambda: all_collectives(graph_input))
    graph_input.copy_(x + 1)
    replay()
    torch.cuda.synchronize()
    for name, same in (
        ("at once", torch.equal(all_collectives(x), x)),
        ("in a graph", torch.equal(result, x + 1)),
        ("on the host", group.min(7) == 7),
    ):
        print(f"{'ok' if same else 'FAILED':8}collectives of one rank, {name}", flush=True)
        if not same:
            problems.append(f"collectives of one rank, {name}: another result")
    group.close()
    return problems


# ------------------------------------------------------------------ time


def bandwidth_of(name: str, device: str) -> tuple[float, str]:
    """(bytes per second, where the figure is from)."""
    gpu = next((gpu for gpu in GPUS if gpu.name in name), None)
    if gpu is not None:
        return gpu.bytes_per_second, "published"
    source = torch.empty(64 << 20, dtype=torch.int32, device=device)
    target, best = torch.empty_like(source), 1e9
    for _ in range(5):
        started = time.perf_counter()
        target.copy_(source)
        target[:1].cpu()
        best = min(best, time.perf_counter() - started)
    return 2 * source.nbytes / best, "measured by a copy"


def bytes_of_step(model: CausalLM, batch: int, context: int, kv_block_bytes: int) -> float:
    """The least that a decode step reads: all weights but the rows of the embedding it does not
    look up, and the keys and values of each row."""
    table = model.embedding.table  # type: ignore[attr-defined]
    weights = model.weight_bytes
    if not model.config.tie_word_embeddings:
        weights -= table.nbytes
    return weights + batch * context * kv_block_bytes / _BLOCK


def measure(
    runner: ModelRunner,
    batches: Sequence[int],
    context: int,
    bandwidth: float,
    steps: int,
) -> Iterator[dict[str, Any]]:
    """A record for each batch. The cache must be allocated. Raises RuntimeError where a step does
    not give every row a token, whose time would mean nothing."""
    for batch in batches:
        rows, warm = make_rows(batch, context, steps), min(_WARM_STEPS, steps // 2)
        ends = []
        for tokens in begun_ahead(runner, _plans(rows, steps)):
            ends.append(time.perf_counter())
            if len(tokens) != batch:
                raise RuntimeError(f"a step of {batch} rows gave {len(tokens)} tokens")
        seconds = (ends[-2] - ends[warm - 1]) / (len(ends) - 1 - warm)
        needed = bytes_of_step(
            runner.model, batch, context + steps // 2, runner.kv_layout.bytes_per_block
        )
        yield {
            "batch": batch,
            "context": context,
            "seconds": seconds,
            "bytes": needed,
            "floor_seconds": needed / bandwidth,
            "ratio": seconds * bandwidth / needed,
            "tokens_per_second": batch / seconds,
        }


def section(content: dict[str, Any]) -> str:
    """The part of docs/gpu.md about steps."""
    lines = [
        "",
        "## Decode steps",
        "",
        f"{content['model']}, random weights, through a shard's runner: sampling included (half of",
        "the rows greedy), router and gateway not. The floor is the bytes of weights, keys, values",
        f"over {content['bandwidth'] / 1e12:.3g} TB/s ({content['bandwidth_from']});",
        f"the goal is {_GOAL}.",
        "",
        "| weights | rows | positions | step, ms | floor, ms | step / floor | tokens/s |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for record in content["steps"]:
        lines.append(
            f"| {record['weights'] or 'bfloat16'} | {record['batch']} | {record['context']} | "
            f"{record['seconds'] * 1e3:.3f} | {record['floor_seconds'] * 1e3:.3f} | "
            f"{record['ratio']:.2f} | "
            f"{record['tokens_per_second']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def write(content: dict[str, Any], docs: Path) -> None:
    """Adds the figures to those of the kernels in docs/gpu.json and docs/gpu.md."""
    path = docs / "gpu.json"
    kernels: dict[str, Any] = {}
    if path.exists():
        kernels = json.loads(path.read_text(encoding="utf-8"))
    kernels["decode_steps"] = content
    path.write_text(json.dumps(kernels, indent=1) + "\n", encoding="utf-8")
    text = on_gpu.page(kernels.get("cases", []), kernels.get("gpu", content["gpu"]))
    (docs / "gpu.md").write_text(text + section(content), encoding="utf-8")


def _needed_blocks(context: int) -> int:
    return -(-(context + _STEPS + _WARM_STEPS) // _BLOCK) * max(_BATCHES)


def time_steps(name: str, device: Device, config: dict[str, Any]) -> None:
    """Writes the figures. config: fields of ShardConfig; kernels must be chosen before."""
    shape = LARGE if device.memory().free > _LARGE_BYTES else SMALL
    records = []
    for kind in _KINDS:
        runner = make_runner(shape, device, {**config, "quantize": kind})
        if not isinstance(runner.recorded, GraphedModel):
            raise SystemExit("steps are not captured as graphs here")
        block = runner.kv_layout.bytes_per_block
        blocks = int(device.memory().free * 0.8) // block
        context = _CONTEXT
        while _needed_blocks(context) > blocks and context > 64:
            context //= 2
        runner.allocate(_needed_blocks(context))
        bandwidth, source = bandwidth_of(name, runner.config.device)
        for record in measure(runner, _BATCHES, context, bandwidth, _STEPS + _WARM_STEPS):
            records.append({"weights": kind, **record})
            print(json.dumps(records[-1]), flush=True)
        runner.release()
        del runner
        gc.collect()  # the model lies in cycles, and the next one needs its memory
    content = {"gpu": name, "model": shape.name, "bandwidth": bandwidth, "bandwidth_from": source}
    write({**content, "torch": torch.__version__, "steps": records}, _DOCS)
    print(f"wrote {_DOCS / 'gpu.json'} and {_DOCS / 'gpu.md'}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("check", "time"))
    options = parser.parse_args()
    name = on_gpu.gpu_name()
    if not name:
        print("there is no GPU that PyTorch can use here (or TRITON_INTERPRET is set)")
        return 2
    ops.use("triton", "cuda")
    if options.command == "time":
        time_steps(name, CudaDevice(), {})
        return 0
    problems = check(CudaDevice(), {}, on_gpu.never_waiting, make_rows(5, 40, 8))
    problems += check_nccl()
    print("\n".join(problems) or f"steps are right on {name}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
