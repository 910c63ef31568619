"""A request as the router's core sees it: token ids, progress and KV blocks.

Holds no text and decides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING

from headgate.proto.messages import RowSampling

if TYPE_CHECKING:
    from headgate.router.beam_rows import BeamGroup


# Seconds in which later requests may overtake one: for each token of its prompt, and at most.
DELAY_PER_TOKEN = 0.002
MAX_DELAY = 1.0


class RequestStatus(Enum):
    """Where a request is in its life."""

    WAITING = auto()  # in the queue, never scheduled
    RUNNING = auto()  # holds KV blocks and a row in the shards
    PREEMPTED = auto()  # in the queue again: its KV was given up and will be recomputed
    FINISHED = auto()  # ended, stopped or cancelled


@dataclass(slots=True, eq=False)
class Request:
    """One answer to a prompt, a row of the shards. Who makes it fills the first group; the
    scheduler owns the rest.

    A request that was already answered in part (by a router that died) comes with
    `output_ids` filled: it goes on from there. `sampling.max_new_tokens` counts them.

    KV positions: the KV of position p is that of token p of prompt + output. The step
    that computes the last known token samples the next one, so the last token of an
    answer never gets a position.
    """

    id: int  # uint32, unique within the router's life
    prompt_ids: Sequence[int]
    sampling: RowSampling
    arrival: float = 0.0  # seconds on any monotonic clock: the order of service
    adapter_id: str = ""
    lockstep: bool = False  # its sampled token must be known before it is planned again
    skip_prefix_cache: bool = False  # recompute the whole prompt (prompt logprobs)
    leader: Request | None = None  # the first answer to the same prompt, to share its KV of that
    beams: BeamGroup | None = None  # it carries one of these
    output_ids: list[int] = field(default_factory=list)  # confirmed

    status: RequestStatus = RequestStatus.WAITING
    finish_reason: str = ""  # "length", "eos", "stop_token", "cancelled" or what finish() was told
    num_prefill_tokens: int = 0  # tokens known when its row was last sent; their end samples first
    num_scheduled: int = 0  # KV positions planned, guessed tokens apart
    num_confirmed: int = 0  # KV positions whose results are back, or that it has from others
    in_flight: int = 0  # plans without a result that compute it
    drafts_in_flight: int = 0  # guessed tokens that these may compute of it too
    row_sent: bool = False  # the shards hold its row
    last_sequence: int = 0  # of the last plan that computed it
    block_ids: list[int] = field(default_factory=list)  # block table
    fork_of: Request | None = None  # its table is a fork of this one's, and the shards don't know
    copies: list[tuple[int, int]] = field(default_factory=list)  # of blocks, that it begins with
    block_hashes: list[bytes] = field(default_factory=list)  # of its leading full blocks, as needed
    num_published: int = 0  # leading blocks that were offered to the prefix cache
    num_cached_tokens: int = 0  # prompt tokens its first admission found in the prefix cache
    num_pooled: int = 0  # prompt positions that pooled_sum covers
    pooled_sum: Sequence[float] = ()  # of their hidden states
    next_prompt_logprob: int = 1  # position of the first prompt logprob not yet delivered
    preemptions: int = 0
    recoveries: int = 0  # times the shards were lost while it ran
    first_scheduled: float | None = None  # seconds, on the clock of `arrival`
    max_positions: int = field(init=False)  # KV positions it takes if it runs to max_new_tokens

    def __post_init__(self) -> None:
        self.max_positions = len(self.prompt_ids) + self.sampling.max_new_tokens - 1

    @property
    def order(self) -> tuple[float, int]:
        """Sort key of service: first come, first served, but for shorter prompts soon after.

        Where many wait, the short ones get their first token sooner, and the long ones, which take
        long themselves, hardly later. It never changes, so nobody waits for ever.
        """
        delay = min(len(self.prompt_ids) * DELAY_PER_TOKEN, MAX_DELAY)
        return self.arrival + delay, self.id

    @property
    def num_tokens(self) -> int:
        """Prompt and confirmed output tokens."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_settled(self) -> int:
        """Leading KV positions whose content is certain by now: those planned of the tokens that
        its row was sent with, and those confirmed. A sampled token's may be planned and never
        computed, since it may have ended the row.
        """
        return max(min(self.num_scheduled, self.num_prefill_tokens), self.num_confirmed)

    @property
    def num_reserved(self) -> int:
        """KV positions that it comes to if all guesses of the plans in flight are right."""
        return min(self.num_scheduled + self.drafts_in_flight, self.max_positions)

    @property
    def takes_drafts(self) -> bool:
        """Whether tokens may be guessed for it: not where a grammar or a search needs each token
        before the next."""
        return not self.lockstep and self.beams is None and not self.sampling.grammar

    @property
    def num_rows(self) -> int:
        """Rows of the shards that it stands for, those of beams to come included."""
        return 1 if self.beams is None else self.beams.num_rows(self)

    @property
    def is_running(self) -> bool:
        return self.status is RequestStatus.RUNNING

    @property
    def is_finished(self) -> bool:
        return self.status is RequestStatus.FINISHED

    @property
    def is_prefilling(self) -> bool:
        """Whether more than the token that samples first is left of its prompt to plan."""
        return self.num_scheduled < self.num_prefill_tokens - 1

    @property
    def can_go_on(self) -> bool:
        """Whether more of it can be planned now, while it runs."""
        planned = self.num_scheduled
        if planned < self.num_prefill_tokens:
            return True
        return planned < self.max_positions and (not self.lockstep or planned < self.num_tokens)

    @property
    def leader_to_fork(self) -> Request | None:
        """Where a request that has no token of its own finds the KV of its prompt."""
        leader = self.leader
        return leader if leader and leader.is_running and not self.output_ids else None

    def take_further(self, num_right: int) -> None:
        """A plan brought it a token, and as many of the plan's guesses were right: all of its
        tokens are computed but the last, and what is planned since goes on from there."""
        self.num_confirmed = max(self.num_confirmed, self.num_tokens - 1)
        if num_right:
            self.num_scheduled = min(self.num_scheduled + num_right, self.max_positions)

    def token_ids(self, start: int, stop: int) -> list[int]:
        """Ids of tokens [start, stop) of prompt + output."""
        split = len(self.prompt_ids)
        if stop <= split:
            return list(self.prompt_ids[start:stop])
        outputs = self.output_ids[max(start - split, 0) : stop - split]
        return [*self.prompt_ids[start:split], *outputs]
