"""Before serving: the largest steps once, and how many KV blocks there is room for after them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from headgate.proto.messages import NewRow, RowSampling, StepPlan
from headgate.shard.errors import ModelError
from headgate.shard.memory import is_out_of_memory

if TYPE_CHECKING:
    from headgate.shard.model_runner import ModelRunner

# Of the device's memory; the rest is for fragmentation and what the libraries take later.
_USABLE = 0.95
# A CPU's memory was divided by the launcher: there it is enough to touch every kernel once.
_CPU_TOKENS = 128


def warm_up(runner: ModelRunner, max_tokens: int, max_rows: int) -> int:
    """Runs a step of `max_tokens` tokens and one of `max_rows` rows (0: as many as can be).

    On a CPU both are cut to 128, since memory is not what is found out there.
    Returns the KV blocks that fit. All ranks must call it together. Drops the KV cache there was.
    Raises ModelError where these steps don't fit, or no block does.
    """
    config = runner.config
    if config.device == "cpu":
        max_tokens = min(max_tokens, _CPU_TOKENS)
    plans = _plans(runner, max_tokens, min(max_rows or max_tokens, max_tokens))
    num_blocks = max(sum(len(row.block_ids) for row in plan.new_rows) for plan in plans)
    cuda = config.device == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    try:
        runner.record()
        runner.allocate(num_blocks)
        for plan in plans:
            refused = runner.step(plan).refused
            if refused:
                raise ModelError(f"the warm-up step was refused: {refused}")
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ModelError(
            f"not enough memory for a step of {max_tokens} tokens; "
            "decrease --max-batch-prefill-tokens"
        ) from error
    finally:
        runner.release()
    if config.num_blocks:
        return config.num_blocks
    return _blocks_that_fit(runner, num_blocks)


def _plans(runner: ModelRunner, max_tokens: int, max_rows: int) -> list[StepPlan]:
    """One step with prompts as long as can be, one with as many rows as can be."""
    longest = max(1, runner.config.max_total_tokens - 1)
    lengths = [longest] * (max_tokens // longest)
    if max_tokens % longest:
        lengths.append(max_tokens % longest)
    return [_plan(runner, lengths, 1), _plan(runner, [1] * max_rows, 2)]


def _plan(runner: ModelRunner, lengths: list[int], sequence: int) -> StepPlan:
    rows, first_block = [], 0
    for index, length in enumerate(lengths):
        blocks = -(-length // runner.config.block_size)
        rows.append(
            NewRow(
                id=index,
                prompt_ids=[0] * length,
                sampling=RowSampling(max_new_tokens=1, temperature=1.0),
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
        counts=lengths,
    )


def _blocks_that_fit(runner: ModelRunner, blocks_used: int) -> int:
    """What is left of a GPU's memory beside the largest step, in KV blocks."""
    block = runner.kv_layout.bytes_per_block
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    others = total - free - torch.cuda.memory_reserved()
    peak = torch.cuda.max_memory_allocated() - blocks_used * block
    budget = int(total * runner.config.cuda_memory_fraction * _USABLE)
    num_blocks = (budget - others - peak) // block
    if num_blocks < 1:
        raise ModelError(
            f"no memory for KV: of {budget} bytes usable, {others} are taken by others and {peak} "
            "by the model and its largest step; decrease --max-batch-prefill-tokens"
        )
    return num_blocks
