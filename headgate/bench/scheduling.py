"""What the router's scheduler and prefix cache cost by themselves, in this process."""

from __future__ import annotations

import statistics
import time

from headgate import garbage
from headgate.proto.messages import RowEnd, RowSampling, StepPlan, StepResult
from headgate.router.kv_cache_manager import KVCacheManager
from headgate.router.request import Request
from headgate.router.scheduler import Scheduler
from headgate.router.scheduler_config import SchedulerConfig

BLOCK_SIZE = 16
PROMPT_TOKENS = 40
PROMPT_BLOCKS = 64  # of the prompts that fill the cache and are looked up in it


def step_milliseconds(rows: int, rounds: int = 300) -> float:
    """Median of `schedule` and `update` together, with `rows` requests that generate."""
    scheduler = Scheduler(
        SchedulerConfig(
            num_blocks=rows * (PROMPT_TOKENS + 2 * rounds) // BLOCK_SIZE,
            block_size=BLOCK_SIZE,
            max_batch_prefill_tokens=rows * PROMPT_TOKENS,
        )
    )
    for row in range(1, rows + 1):
        prompt = list(range(row, row + PROMPT_TOKENS))
        sampling = RowSampling(max_new_tokens=rounds + 1)
        scheduler.add(Request(row, prompt, sampling, arrival=float(row)))
    garbage.settle()  # as the router does
    times = []
    for sequence in range(1, rounds + 1):
        started = time.perf_counter()
        plan = scheduler.schedule(1, sequence)
        planned = time.perf_counter()
        assert plan is not None and len(plan.rows) == rows
        result = _answer(plan)
        answered = time.perf_counter()
        scheduler.update(result)
        times.append(time.perf_counter() - answered + planned - started)
    return statistics.median(times) * 1e3


def _answer(plan: StepPlan) -> StepResult:
    """A token for every row."""
    count = len(plan.rows)
    return StepResult(
        plan.epoch,
        plan.sequence,
        rows=plan.rows,
        token_ids=[plan.sequence] * count,
        logprobs=[0.0] * count,
        ends=[RowEnd.NONE] * count,
    )


def lookup_microseconds(cached_blocks: int, rounds: int = 200) -> float:
    """Median of finding a prompt of 64 blocks in a prefix cache of `cached_blocks`, hashed anew."""
    prompts = cached_blocks // PROMPT_BLOCKS
    kv = KVCacheManager(prompts * PROMPT_BLOCKS + 1, BLOCK_SIZE)
    for number in range(prompts):
        request = _prompt(number)
        assert kv.admit(request, [], len(request.prompt_ids))
        request.num_confirmed = PROMPT_BLOCKS * BLOCK_SIZE
        kv.publish(request)
        kv.free(request)
    times = []
    for number in range(rounds):
        request = _prompt(number % prompts)
        started = time.perf_counter()
        hits = kv.match(request)
        times.append(time.perf_counter() - started)
        assert len(hits) == PROMPT_BLOCKS
    return statistics.median(times) * 1e6


def _prompt(number: int) -> Request:
    """A prompt of PROMPT_BLOCKS blocks and a token, like no other number's."""
    first = number * PROMPT_BLOCKS * BLOCK_SIZE
    tokens = range(first, first + PROMPT_BLOCKS * BLOCK_SIZE + 1)
    return Request(number, tokens, RowSampling(max_new_tokens=1))
