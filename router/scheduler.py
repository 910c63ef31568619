"""What each step computes: a token budget shared by running rows and waiting requests.

Pure policy: state in, `StepPlan` out, `StepResult` in, `RowOutput`s out. Deterministic; it does
no I/O, reads no clock and knows no text.
"""

from __future__ import annotations

from dataclasses import dataclass

from headgate.proto.messages import PromptLogprobs, RowEnd, StepPlan, StepResult, TopTokens
from headgate.router.request import Request


class RequestTooLarge(ValueError):
    """A request that could not run even alone. Its message has the numbers."""


class ProtocolError(RuntimeError):
    """A result that does not answer the plan it names: router and shards disagree."""


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


@dataclass(slots=True)
class RowOutput:
    """What one step brought to one request."""

    request: Request
    token_id: int | None  # None: only prompt logprobs
    logprob: float = 0.0
    top: TopTokens | None = None
    end: RowEnd = RowEnd.NONE
    prompt_logprobs: PromptLogprobs | None = None  # each position once, whatever was recomputed


class Scheduler:
    """Owns every unfinished request and the KV accounting."""

    def __init__(self, config: SchedulerConfig) -> None: ...

    def add(self, request: Request) -> None:
        """Queues a request. Raises RequestTooLarge, or ValueError for an id in use."""

    def cancel(self, request_id: int) -> bool:
        """Drops a request whatever its state. False: not here (any more)."""

    def finish(self, request_id: int, reason: str) -> bool:
        """As cancel, for a request that ended well (stop string): counts as a finished answer."""

    def schedule(self, epoch: int, sequence: int, now: float = 0.0) -> StepPlan | None:
        """The next plan; None when there is nothing to compute (now)."""

    def update(self, result: StepResult) -> list[RowOutput]:
        """Takes a result. Results of plans that were voided or of lost shards give nothing.

        Raises ProtocolError.
        """

    def refused(self, sequence: int) -> None:
        """The group refused this plan: it and the later ones are void, the next one resets the rows."""

    def reset(self, num_blocks: int | None = None) -> list[Request]:
        """The shards were lost, all KV with them. Returns requests that no longer fit (now FINISHED)."""

    def has_work(self) -> bool:
        """Whether any request is unfinished."""

    @property
    def stats(self) -> SchedulerStats: ...

    def check_integrity(self) -> None:
        """Raises AssertionError where the books do not balance."""
