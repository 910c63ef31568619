"""What each step computes: a token budget shared by running rows and waiting requests.

Pure policy: state in, `StepPlan` out, `StepResult` in, `RowOutput`s out. Deterministic; it does
no I/O, reads no clock and knows no text.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import nsmallest
from itertools import chain, islice

from headgate.proto.messages import StepPlan, StepResult
from headgate.router.admission import Admission
from headgate.router.beam_rows import BeamGroup
from headgate.router.kv_cache_manager import KVCacheManager
from headgate.router.outstanding_steps import OutstandingStep, OutstandingSteps
from headgate.router.request import Request, RequestStatus
from headgate.router.request_size import RequestSize
from headgate.router.row_output import ProtocolError, RowOutput, more_tokens
from headgate.router.row_set import RowSet, order_of
from headgate.router.scheduler_config import RequestTooLarge, SchedulerConfig, SchedulerStats
from headgate.router.step_budget import StepBudget
from headgate.router.step_draft import StepDraft

__all__ = [
    "ProtocolError",
    "RequestTooLarge",
    "RowOutput",
    "Scheduler",
    "SchedulerConfig",
    "SchedulerStats",
]


# A step with guesses has at most this part of the largest step's tokens; or one guess for each row,
# up to the larger part; or one to so many rows.
DRAFT_SHARE = 10
CROWDED_SHARE = 5
ROWS_PER_DRAFT = 4


class Scheduler:
    """Owns every unfinished request and the KV accounting.

    A request's progress has two counters in KV positions: `num_scheduled`, as far as it is
    planned, and `num_confirmed`, as far as results are back. `schedule` works on the first,
    so that it can run ahead of results; `update` moves the second. A row's greatest length is
    known, so no plan goes beyond it; its end of sequence is not, so a plan may hold a row that
    has ended: the shards skip those they ended themselves, and what they still compute for
    rows that the router stopped is dropped here.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._kv = KVCacheManager(config.num_blocks, config.block_size, config.prefix_caching)
        self._admission = Admission(self._kv, config.kv_overcommit)
        self._rows = RowSet(self._kv)
        self._size = RequestSize(config, self._kv)
        self._outstanding = OutstandingSteps()
        self.planned_prompt = False  # the last plan computes a part of a prompt
        self._reset_rows = False  # the next plan drops all rows of the shards
        self._budget = StepBudget(config.max_batch_prefill_tokens)
        self._totals = dict.fromkeys(("prefix_queries", "prefix_hits", "recoveries", "refusals"), 0)

    # ------------------------------------------------------------ requests

    def add(self, request: Request) -> None:
        """Queues a request. Raises RequestTooLarge, or ValueError for what cannot be one."""
        if request.id in self._rows:
            raise ValueError(f"request {request.id} is here already")
        if not request.prompt_ids:
            raise ValueError(f"request {request.id} has an empty prompt")
        if len(request.output_ids) >= request.sampling.max_new_tokens:
            raise ValueError(f"request {request.id} has all its tokens already")
        self._size.check(request)
        self._rows.add(request)

    def cancel(self, request_id: int) -> bool:
        """Drops a request whatever its state. False: not here (any more)."""
        request = self._rows.find(request_id)
        if request is None:
            return False
        self._rows.end(request, "cancelled")
        return True

    def finish(self, request_id: int, reason: str) -> bool:
        """As cancel, for a request that ended well (stop string): counts as a finished answer."""
        request = self._rows.find(request_id)
        if request is None:
            return False
        self._admission.record(request)
        self._rows.end(request, reason)
        return True

    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return len(self._rows) > 0

    @property
    def has_waiting(self) -> bool:
        """Whether a request waits for a place in a step."""
        return len(self._rows.waiting) > 0

    # ------------------------------------------------------------ planning

    def schedule(self, epoch: int, sequence: int, now: float = 0.0) -> StepPlan | None:
        """The next plan, which may be sent while results are outstanding.

        None when nothing can be computed: no work, or only rows whose results are needed
        first. `now` is noted as the first scheduling time of the requests it admits.
        """
        draft = StepDraft(epoch, sequence, self._budget.tokens)
        early, late = self._running_by_turn(draft.budget)
        draft.budget -= len(late)  # each is sure of one token
        self._plan_rows(early, draft)
        if not draft.preempted:
            self._admit_waiting(draft, now)
        draft.budget += len(late)
        self._plan_rows(late, draft)
        if self._rows.waiting and self._is_stuck(draft):
            self._admit_waiting(draft, now)
            if self._is_stuck(draft) and self._rows.running:
                # Only beams that wait for others of theirs, which cannot come in: make room.
                self._rows.give_way(list(self._rows.running))
                self._admit_waiting(draft, now)
        self._check_draft(draft)
        if not draft.rows:
            return None
        removed, self._rows.removed = self._rows.removed, []
        reset, self._reset_rows = self._reset_rows, False
        self.planned_prompt = draft.holds_prompt
        plan = draft.plan(removed, reset)
        self._outstanding.add(draft.outstanding(plan))
        return plan

    def _is_stuck(self, draft: StepDraft) -> bool:
        """Whether neither this plan nor one before it brings anything on."""
        return not draft.rows and not self._outstanding

    def _running_by_turn(self, budget: int) -> tuple[list[Request], list[Request]]:
        """The rows that can go on; apart, unfinished prompts that come after the queue's head."""
        ready = [row for row in self._rows.running if row.can_go_on]
        if len(ready) > budget:  # after a refusal: the first in order, and the others in turns
            others = nsmallest(budget - 1, ready[1:], key=_turn)
            ready = [ready[0], *sorted(others, key=order_of)]
        if not self._rows.waiting:
            return ready, []
        head = self._rows.waiting.head.order
        early: list[Request] = []
        late: list[Request] = []
        for row in ready:
            (late if row.is_prefilling and row.order > head else early).append(row)
        return early, late

    def _plan_rows(self, rows: list[Request], draft: StepDraft) -> None:
        """One token for each row, what is left to unfinished prompts in order.

        Each is sure of one token, so neither answers nor prompts starve the other.
        """
        extra = draft.budget - len(rows)
        draft.most_guesses = self._most_guesses(len(self._rows.running))
        for row in rows:
            if draft.preempted and row.status is not RequestStatus.RUNNING:
                continue  # gave way just now to one before it
            count = 1
            if row.is_prefilling:
                self._totals["prefix_hits"] += self._rows.take_over(row)
                left = row.num_prefill_tokens - row.num_scheduled
                count = self._part(row, left, 1 + extra)
                extra -= count - 1
            elif draft.most_guesses and self._plan_with_guesses(row, draft):
                continue
            target = row.num_scheduled + count
            if row.drafts_in_flight:
                target = min(target + row.drafts_in_flight, row.max_positions)
            if target <= len(row.block_ids) * self._config.block_size:
                self._plan_row(row, count, (), draft)
                continue
            blocks = self._blocks_by_force(row, target, draft)
            if blocks is not None:
                self._plan_row(row, count, blocks, draft)

    def _part(self, row: Request, left: int, room: int) -> int:
        """How many of the tokens that are left of a prompt to compute in a step with this room.

        All that fit in; where it is the only prompt and takes several such steps, an even part: a
        few tokens that were left for the last step would take that nearly as long as many.
        """
        if left <= room or not self._is_only_prompt(row):
            return min(left, room)
        return -(-left // -(-left // room))

    def _is_only_prompt(self, row: Request) -> bool:
        prefilling = (other for other in self._rows.running if other.is_prefilling)
        return all(other is row for other in chain(islice(self._rows.waiting, 2), prefilling))

    def _most_guesses(self, num_rows: int) -> int:
        """Tokens that may be guessed for so many rows: none that would make the step a long one.

        Where many rows decode, a token more costs a step nearly what it brings, and newcomers wait;
        but what a step takes whatever its tokens is shared by more of them.
        """
        if self._budget.is_cut or not self._config.draft_tokens:
            return 0
        largest = self._config.max_batch_prefill_tokens
        one_each = min(num_rows, largest // CROWDED_SHARE - num_rows)
        return max(largest // DRAFT_SHARE - num_rows, one_each, num_rows // ROWS_PER_DRAFT)

    def _plan_with_guesses(self, row: Request, draft: StepDraft) -> bool:
        """One token for the row and some that the shards may guess, if nobody has to give way.

        How many will be right is not known before the result, so there are blocks for all of them.
        """
        if row.num_scheduled < row.num_prefill_tokens:
            return False
        target = row.num_reserved + 1
        wanted = min(self._config.draft_tokens, draft.most_guesses)
        num_guesses = min(wanted, row.max_positions - target)
        if num_guesses < 1 or not row.takes_drafts:
            return False
        blocks = self._kv.extend(row, target + num_guesses)
        if blocks is None:
            return False
        self._plan_row(row, 1, blocks, draft, num_guesses)
        return True

    def _plan_row(
        self,
        row: Request,
        count: int,
        blocks: Sequence[int],
        draft: StepDraft,
        num_guesses: int = 0,
    ) -> None:
        """Adds it to the draft; what that fills of its prompt can be shared from now on."""
        draft.add(row, count, blocks, num_guesses)
        if row.num_scheduled <= row.num_prefill_tokens:
            draft.filled += self._kv.publish(row)

    def _blocks_by_force(
        self, row: Request, num_positions: int, draft: StepDraft
    ) -> list[int] | None:
        """New blocks for the row, at the cost of the last in order. None: it has to wait.

        The first never gives way, and every request fits alone: so there is always progress.
        """
        while (blocks := self._kv.extend(row, num_positions)) is None:
            latest = self._rows.running[-1]
            if draft.holds(latest):  # another beam, or what a late prompt let go first
                return None  # it waits for the next step
            self._rows.preempt(latest)
            draft.preempted = True
            if not row.is_running:
                return None
        return blocks

    def _admit_waiting(self, draft: StepDraft, now: float) -> None:
        """Starts waiting requests in order, until one of them does not fit in."""
        opened = False
        running = self._rows.running
        num_rows = len(running) + sum(row.num_rows - 1 for row in running if row.beams is not None)
        while self._rows.waiting and draft.budget > 0:
            request = self._rows.waiting.head
            if request.in_flight:
                return  # preempted just now: first takes the token that is on its way
            num_rows += request.num_rows
            if num_rows > self._size.max_rows:
                return
            if not opened:
                self._admission.open(self._rows.running)
                opened = True
            leader = request.leader_to_fork
            admitted = (
                self._admit_fork(request, leader, draft, now)
                if leader is not None
                else self._admit(request, draft, now)
            )
            if not admitted:
                return

    def _admit(self, request: Request, draft: StepDraft, now: float) -> bool:
        """Starts the head of the queue from what the prefix cache has of it, if it fits in."""
        hits = self._kv.match(request)
        beams = request.beams
        alone = all(beams is not None and row.beams is beams for row in self._rows.running)
        if not self._admission.fits(request, hits, alone):
            return False
        source = self._kv.match_half(request, len(hits), draft.filled)
        cached = len(hits) * self._config.block_size
        if source is not None:
            cached += self._kv.half_block
        count = self._part(request, request.num_tokens - cached, draft.budget)
        if not self._kv.admit(request, hits, cached + count):
            return False
        if source is not None:
            request.copies = [(source, request.block_ids[len(hits)])]
        if not request.skip_prefix_cache and self._config.prefix_caching:
            self._totals["prefix_queries"] += request.num_tokens
            self._totals["prefix_hits"] += cached
        if request.first_scheduled is None:
            request.num_cached_tokens = min(cached, len(request.prompt_ids))
        self._start(request, cached, now)
        self._plan_row(request, count, (), draft)
        return True

    def _admit_fork(self, request: Request, leader: Request, draft: StepDraft, now: float) -> bool:
        """Starts the head of the queue with its leader's KV of the prompt, if it fits in.

        It computes the prompt's last token itself, for the logits to sample from. Until the
        leader's prompt is planned up to there, it waits.
        """
        shared = len(request.prompt_ids) - 1
        full, rest = divmod(shared, self._config.block_size)
        if draft.planned_before(leader) < shared:
            return False
        if rest and leader.block_ids[full] in draft.filled:
            return False  # it shares what another row has in this plan, and copies are made first
        blocks = leader.block_ids[:full]
        if not self._admission.fits(request, blocks, alone=False):
            return False
        copies = self._kv.fork(leader, request, shared)
        if copies is None:
            return False
        request.fork_of, request.copies = leader, copies
        self._start(request, shared, now)
        self._plan_row(request, 1, (), draft)
        return True

    def _start(self, request: Request, num_computed: int, now: float) -> None:
        """The head of the queue runs from now on, with this many positions computed."""
        self._rows.waiting.pop()
        if request.first_scheduled is None:
            request.first_scheduled = now
        if request.beams is not None:
            request.beams.forget(request)
        self._rows.start(request, num_computed)

    def _check_draft(self, draft: StepDraft) -> None:
        """What must hold at the end of `schedule`, whatever the load."""
        config = self._config
        assert draft.budget >= 0
        assert not config.max_batch_size or len(self._rows.running) <= config.max_batch_size
        assert not self._is_stuck(draft) or not self._rows, "stuck: work but no plan"

    # ------------------------------------------------------------ results

    def update(self, result: StepResult) -> list[RowOutput]:
        """Takes a result; what it brought to requests that still live, in batch order.

        A result of a voided plan or of lost shards brings nothing. Raises ProtocolError, and
        nothing is done, for one that is out of order or does not match its plan.
        """
        plan = self._outstanding.find(result.epoch, result.sequence)
        if plan is None:
            return []
        if result.refused:
            self._void(plan)
            return []
        places = plan.places(result)
        self._outstanding.answered()
        self._budget.grow()
        prompt_logprobs = {entry.row: entry for entry in result.prompt_logprobs}
        pooled = {entry.row: entry for entry in result.pooled}
        outputs: list[RowOutput] = []
        block_size = self._config.block_size
        searches: dict[BeamGroup, None] = {}
        guessing = self._config.draft_tokens > 0
        # An Enum's attribute takes ten times as long to read as a name of the function's own.
        running, finished = RequestStatus.RUNNING, RequestStatus.FINISHED
        for (request, _, guesses, num_positions, _), (place, found) in zip(
            plan.rows, places, strict=True
        ):
            request.in_flight -= 1
            if guesses:
                request.drafts_in_flight -= guesses
            if request.status is finished:
                continue  # ended by the plan before, or stopped by the router since
            output = RowOutput(request)
            if prompt_logprobs and request.id in prompt_logprobs:
                output.take_prompt_logprobs(prompt_logprobs[request.id])
            if pooled and request.id in pooled:
                output.take_pooled(pooled[request.id])
            if found and request.beams is not None:
                request.beams.take(request, result.top[place])
                searches[request.beams] = None
                found = 0
            elif found:
                output.take_token(result, place)
            if found or output.prompt_logprobs:
                outputs.append(output)
            if found > 1:
                outputs += more_tokens(request, result, range(place + 1, place + found))
                output = outputs[-1]
            if request.status is running:  # else its blocks are gone
                if guessing and found:
                    request.take_further(found - 1)
                elif num_positions > request.num_confirmed:
                    request.num_confirmed = num_positions
                if request.num_confirmed // block_size > request.num_published:
                    self._kv.publish(request)
            if output.end:
                if output.pooled is None:  # else there was no answer to learn from
                    self._admission.record(request)
                self._rows.end(request, output.end.name.lower())
        for group in searches:
            if group.is_complete and not self._rows.next_round(group):
                outputs.append(self._end_search(group))
        return outputs

    def _end_search(self, group: BeamGroup) -> RowOutput:
        leader = group.members[0]
        self._admission.record(leader)
        self._rows.end(leader, "beams")
        output = RowOutput(leader)
        output.hypotheses = group.search.finished
        return output

    # ------------------------------------------------------------ setbacks

    def refused(self, sequence: int) -> None:
        """The group refused this plan, so all later ones too: the rows are sent anew.

        What earlier plans computed stays valid; the next plan resets the rows and steps are
        smaller for a while. For a plan that is void already it does nothing.
        """
        for plan in self._outstanding:
            if plan.sequence == sequence:
                found = self._outstanding.find(plan.epoch, sequence)
                assert found is plan
                self._void(plan)
                return

    def _void(self, refused: OutstandingStep) -> None:
        self._rows.rewind(list(self._outstanding))
        self._outstanding.drop()
        self._reset_rows = True
        self._budget.cut(refused.num_tokens)
        self._totals["refusals"] += 1

    def reset(self, num_blocks: int | None = None) -> list[Request]:
        """The shards were lost, all KV with them: what ran goes back to the queue.

        New shards may have another number of blocks. Returns the requests that
        are too large for them, dropped from here.
        """
        self._outstanding.drop()
        for row in list(self._rows.running):
            self._rows.leave(row)
            self._rows.requeue(row)
            row.recoveries += 1
            self._totals["recoveries"] += 1
        self._kv.clear(num_blocks)
        self._rows.removed.clear()
        self._reset_rows = False
        self._budget.restore()
        too_large = []
        for request in list(self._rows.waiting):
            request.last_sequence = 0
            if request.is_finished:
                continue  # with another of its beams
            if not self._size.fits(request):
                self._rows.end(request, "too_large")
                too_large.append(request if request.beams is None else request.beams.members[0])
        return too_large

    # ------------------------------------------------------------ inspection

    @property
    def stats(self) -> SchedulerStats:
        """A snapshot; it forecasts anew, so ask at scrapes rather than at each step."""
        pool = self._kv.pool
        return SchedulerStats(
            num_running=len(self._rows.running),
            num_waiting=len(self._rows.waiting),
            blocks_total=pool.num_blocks,
            blocks_used=pool.num_used,
            blocks_cached=pool.num_cached,
            blocks_free=pool.num_free,
            refusals_in_a_row=self._budget.refusals_in_a_row,
            step_budget=self._budget.tokens,
            predicted_peak_blocks=self._admission.peak_blocks(self._rows.running),
            preemptions=self._rows.preemptions,
            **self._totals,
        )

    def check_integrity(self) -> None:
        """Raises AssertionError where the books do not balance."""
        self._rows.check_integrity()
        in_flight, guesses = self._outstanding.in_flight(), self._outstanding.drafts_in_flight()
        for request in self._rows.unfinished():
            assert request.in_flight == in_flight[request]
            assert request.drafts_in_flight == guesses[request]


def _turn(row: Request) -> tuple[int, float, int]:
    return row.last_sequence, *row.order
