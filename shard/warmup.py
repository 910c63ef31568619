"""Before serving: the largest steps once, and how many KV blocks there is room for after them."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING

from headgate.proto.messages import NewRow, RowSampling, StepPlan
from headgate.shard.cuda_graphs import GraphedModel
from headgate.shard.device import DeviceMemory
from headgate.shard.errors import ModelError
from headgate.shard.memory import give_back, is_out_of_memory

if TYPE_CHECKING:
    from headgate.shard.model_runner import ModelRunner

# Of the device's memory; the rest is for fragmentation and what the libraries take later.
_USABLE = 0.95
_LEAST_GRAPH_BYTES = 1 << 20  # that a CUDA graph is counted with
# A CPU's memory was divided by the launcher: there it is enough to touch every kernel once.
_CPU_TOKENS = 32
_SMALLEST_CHUNK = 16  # tokens


def warm_up(runner: ModelRunner, max_tokens: int, max_rows: int) -> int:
    """Runs a step of `max_tokens` tokens and one of `max_rows` rows (0: as many as can be).

    On a CPU both are cut to 32 tokens, since memory is not what is found out there. On a GPU
    smaller steps follow, so that kernels are compiled before they are waited for.
    Returns the KV blocks that fit. All ranks must call it together. Drops the KV cache there was.
    Raises ModelError where these steps don't fit, or no row of the largest size does.
    """
    config, device = runner.config, runner.device
    if device is None:
        max_tokens = min(max_tokens, _CPU_TOKENS)
    plans = _plans(runner, max_tokens, min(max_rows or max_tokens, max_tokens))
    num_blocks = max(sum(len(row.block_ids) for row in plan.new_rows) for plan in plans)
    if device is not None:
        device.forget_peak()
    try:
        runner.record()
        runner.allocate(num_blocks)
        for plan in plans:
            refused = runner.step(plan).refused
            if refused:
                raise ModelError(f"the warm-up step was refused: {refused}")
        graphs = _graph_bytes(runner)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold what there was no room beside
        raise ModelError(_no_room(runner, max_tokens)) from error
    finally:
        runner.release()
    if device is None:
        give_back()  # a sampled step of many rows takes several copies of all their logits
        return config.num_blocks
    if config.num_blocks:
        return config.num_blocks
    step = _LargestStep(max_tokens, num_blocks * runner.kv_layout.bytes_per_block, graphs)
    return _blocks_that_fit(runner, device.memory(), step)


@dataclass(frozen=True, slots=True)
class _LargestStep:
    """What warming up took."""

    tokens: int
    kv_bytes: int  # of its own cache
    graph_bytes: int  # for all CUDA graphs that serving may capture


def _graph_bytes(runner: ModelRunner) -> int:
    """Memory to keep for CUDA graphs: a second one is captured to see what each takes beside the
    activations, which all share. The largest was captured by the step of most rows."""
    graphed, device = runner.recorded, runner.device
    if device is None or not isinstance(graphed, GraphedModel) or not graphed.num_possible:
        return 0
    graphed.drop_graphs()
    free = [device.memory().free]
    for rows in (graphed.sizes[-1], graphed.sizes[0]):
        graphed.capture(rows)
        free.append(device.memory().free)
    shared, each = free[0] - free[1], max(free[1] - free[2], _LEAST_GRAPH_BYTES)
    return max(shared, 0) + each * (graphed.num_possible - 1)


def _plans(runner: ModelRunner, max_tokens: int, max_rows: int) -> list[StepPlan]:
    """One step with prompts as long as can be, one with as many rows as can be; then, on a GPU,
    beginnings and ends of a prompt in chunks of all sizes that kernels may tell apart."""
    longest = max(1, runner.config.max_total_tokens - 1)
    lengths = [longest] * (max_tokens // longest)
    if max_tokens % longest:
        lengths.append(max_tokens % longest)
    plans = [_plan(runner, lengths, 1), _plan(runner, [1] * max_rows, 2)]
    context, tokens = min(longest, max_tokens), _SMALLEST_CHUNK
    while runner.device is not None and tokens < context:
        for first in (0, context - tokens):
            plans.append(_plan(runner, [first + tokens], len(plans) + 1, first))
        tokens *= 2
    return plans


def _plan(
    runner: ModelRunner, lengths: list[int], sequence: int, num_computed: int = 0
) -> StepPlan:
    """num_computed: tokens of each row that are not in the step, but before it."""
    rows, first_block = [], 0
    for index, length in enumerate(lengths):
        blocks = -(-length // runner.config.block_size)
        rows.append(
            NewRow(
                id=index,
                prompt_ids=[0] * length,
                sampling=RowSampling(max_new_tokens=1, temperature=1.0),
                num_computed_tokens=num_computed,
                block_ids=range(first_block, first_block + blocks),
            )
        )
        first_block += blocks
    return StepPlan(
        epoch=runner.identity.epoch,
        sequence=sequence,
        reset=True,
        new_rows=rows,
        rows=range(len(lengths)),
        counts=[length - num_computed for length in lengths],
    )


def _blocks_that_fit(runner: ModelRunner, memory: DeviceMemory, step: _LargestStep) -> int:
    """What is left of a GPU's memory beside the largest step and the graphs, in KV blocks.

    Raises ModelError where that does not hold one row of the largest size.
    """
    config, block = runner.config, runner.kv_layout.bytes_per_block
    others = memory.total - memory.free - memory.reserved
    peak = memory.peak - step.kv_bytes
    budget = int(memory.total * config.cuda_memory_fraction * _USABLE)
    left = budget - others - peak - step.graph_bytes
    row = -(-config.max_total_tokens // config.block_size) * block
    if left >= row:
        return left // block
    needed = (
        f"not enough memory: {_gib(row)} for the KV of one request of {config.max_total_tokens} "
        f"tokens, {_gib(runner.model.weight_bytes)} for weights, "
        f"{_gib(peak - runner.model.weight_bytes)} for a step of {step.tokens} tokens and "
        f"{_gib(step.graph_bytes)} for CUDA graphs are needed, and of {_gib(budget)} usable "
        f"{_gib(budget - others)} are free"
    )
    raise ModelError(f"{needed}; {_advice(runner, left - row, peak, step)}")


def _advice(runner: ModelRunner, short: int, peak: int, step: _LargestStep) -> str:
    """The largest settings that fit, each alone; `short`: bytes missing, below zero."""
    config = runner.config
    found = []
    token_bytes = (peak - runner.model.weight_bytes) / step.tokens
    tokens = step.tokens - int(-short / token_bytes) - 1 if token_bytes > 0 else 0
    if tokens > 0:
        found.append(f"--max-batch-prefill-tokens {tokens}")
    block = runner.kv_layout.bytes_per_block
    blocks = -(-config.max_total_tokens // config.block_size) - -(short // block)
    if blocks > 0:
        found.append(f"--max-total-tokens {blocks * config.block_size}")
    if step.graph_bytes + short >= 0:
        found.append("--cuda-graphs 0")
    if not found:
        return "no setting makes it fit: use more GPUs (--num-shard) or quantise the weights"
    return f"what fits: {' or '.join(found)}"


def _no_room(runner: ModelRunner, max_tokens: int) -> str:
    """After a step for which memory was too small: the message, with the largest that fits."""
    message = f"not enough memory for a step of {max_tokens} tokens"
    device = runner.device
    if device is None or runner.group.world_size > 1:  # the others are not here to try
        return f"{message}; decrease --max-batch-prefill-tokens"
    tokens = max_tokens // 2
    while tokens and not _fits(runner, tokens):
        tokens //= 2
    memory = device.memory()
    free = f"{_gib(memory.free + memory.reserved - runner.model.weight_bytes)} are free for it"
    if not tokens:
        return f"{message}: {free}, and no step fits; use more GPUs (--num-shard)"
    return f"{message}: {free}; one of {tokens} fits: --max-batch-prefill-tokens {tokens}"


def _fits(runner: ModelRunner, tokens: int) -> bool:
    """Whether a step of so many tokens runs."""
    plan = _plans(runner, tokens, 1)[0]
    runner.release()
    try:
        runner.allocate(sum(len(row.block_ids) for row in plan.new_rows))
        return not runner.step(plan).refused
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        runner.release()


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
