"""The scheduler's limits, and the figures it shows. No behaviour."""

from __future__ import annotations

from dataclasses import dataclass


class RequestTooLarge(ValueError):
    """A request that could not run even alone. Its message has the numbers."""

    def __init__(self, message: str, field: str = "max_new_tokens") -> None:
        """`field`: the parameter that asks for too much."""
        super().__init__(message)
        self.field = field


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits. All lengths in tokens."""

    num_blocks: int  # KV blocks in the shards
    block_size: int  # tokens per block
    max_batch_prefill_tokens: int  # tokens of one step
    max_batch_size: int = 0  # rows running at once; 0: no limit but the step's tokens
    max_total_tokens: int = 0  # prompt + max_new_tokens of one request; 0: what fits into KV
    kv_overcommit: float = 0.1  # [0, 1]; see admission.py
    prefix_caching: bool = True
    draft_tokens: int = 0  # guessed tokens that a step may compute of a row beyond its next


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """A snapshot, for metrics."""

    num_running: int
    num_waiting: int  # preempted ones included
    blocks_total: int
    blocks_used: int  # held by running requests
    blocks_cached: int  # held by nobody, kept as prefix cache; free for the taking
    blocks_free: int  # empty
    prefix_queries: int  # tokens looked up in the prefix cache, since the start
    prefix_hits: int  # tokens found there
    preemptions: int
    recoveries: int
    refusals: int
    refusals_in_a_row: int  # since the last step that ran
    step_budget: int  # tokens a step may have now
    predicted_peak_blocks: int
