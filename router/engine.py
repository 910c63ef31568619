"""The loop that turns live requests into steps and steps into answers.

Plan k+1 is on its way while the shards compute plan k, and short steps are planned a few at a time:
a message costs both sides what would else be a good part of such a step. Policy is the scheduler's,
the wire the group's, what clients get the delivery's: here they meet, with the clock.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

from headgate.proto import router_pb2
from headgate.proto.messages import StepPlan, StepResult
from headgate.router.best_of import BestOf
from headgate.router.config import RouterConfig
from headgate.router.delivery import Delivery
from headgate.router.errors import (
    DrainingError,
    GenerationError,
    InternalError,
    RequestCancelledError,
    RouterError,
    UnavailableError,
    ValidationError,
)
from headgate.router.live_answers import LiveAnswers
from headgate.router.live_requests import Limiter, LiveAnswer, LiveRequest, Permit, Sink
from headgate.router.metrics import Metrics, StepTimes
from headgate.router.output_processor import Outcome, OutputProcessor
from headgate.router.row_output import ProtocolError
from headgate.router.scheduler import Scheduler
from headgate.router.scheduler_config import RequestTooLarge, SchedulerConfig
from headgate.router.shard_group import GroupBroken, ShardGroup
from headgate.router.status import DRAINING, FAILED, LOADING, ServerStatus
from headgate.router.validation import ValidRequest

logger = logging.getLogger(__name__)

MAX_IN_FLIGHT = 2  # plans, where a step takes longer than AHEAD_SECONDS
AHEAD_SECONDS = 0.008  # of further steps that only go on with what runs: a newcomer waits for them
MAX_AHEAD = 4  # such steps
# For a row that has been alone for some time: hardly anybody comes, and each message wakes
# processes whose memory a step's weights have driven out of the caches.
ALONE_AFTER = 0.25  # seconds
ALONE_AHEAD_SECONDS = 0.030
# Who asks just after a step has begun may still come into the next: that is planned when this share
# of the time that lately the shortest step took has passed, where that is worth a timer.
PATIENCE = 0.4
PATIENT_SECONDS = 0.004
FORGETTING = 1.05  # how much longer the shortest step is taken to be after each other one
MAX_RECOVERIES = 3  # groups that may die under a request before it is taken for the cause
MAX_REFUSALS = 16  # in a row: by then a step has been cut down to one token
LOADING_RETRY = 5.0  # seconds
DRAINED_POLL = 0.02  # seconds


@dataclass(frozen=True, slots=True)
class _Step:
    """A plan on its way."""

    sequence: int
    method: str  # prefill or decode
    sent: float


class Engine:
    """One per router. All methods belong to the event loop's thread."""

    def __init__(
        self,
        config: RouterConfig,
        status: ServerStatus,
        outputs: OutputProcessor,
        metrics: Metrics,
    ) -> None:
        self._config = config
        self._status = status
        self._metrics = metrics
        self._limiter = Limiter(config.max_concurrent_requests)
        self._live = LiveAnswers(outputs)
        self._delivery = Delivery(
            self._live, metrics, config.log_prompts, self._stop_row, self.fail
        )
        self._backlog: list[LiveAnswer] = []  # accepted before there was any KV memory
        self._scheduler: Scheduler | None = None
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._on_first_step: Callable[[int], None] = lambda epoch: None
        self._on_broken: Callable[[GroupBroken], None] = lambda broken: None
        self._last_result = 0.0
        self._step_seconds = AHEAD_SECONDS  # that a step takes, see _take
        self._shortest_step = 0.0  # seconds, of those lately
        self._last_company = -inf  # when a plan last had more than one row
        self._lost_group = False

    # --------------------------------------------------------------- requests

    def admit(self, num_answers: int = 1, resubmitted: bool = False) -> Permit:
        """Room for a request's answers. `resubmitted`: an earlier router had accepted it.

        Raises OverloadedError, DrainingError or UnavailableError.
        """
        state = self._status.state
        if state == FAILED:
            raise UnavailableError(self._status.detail)
        if not resubmitted and state == DRAINING:
            raise DrainingError()
        if not resubmitted and state == LOADING:
            raise UnavailableError("The model is still loading", retry_after=LOADING_RETRY)
        return self._limiter.acquire(num_answers)

    def submit(self, valid: ValidRequest, sink: Sink, permit: Permit) -> LiveRequest:
        """Queues the request and sends `Accepted`. Raises ValidationError, UnavailableError."""
        if self._status.state == FAILED:  # since it was admitted
            raise UnavailableError(self._status.detail)
        if valid.ranked:
            sink = BestOf(sink, valid.num_answers, valid.num_given)
        live = LiveRequest(valid, sink, permit)
        to_schedule = self._live.open(live)
        resumed: list[tuple[LiveAnswer, Outcome]] = []
        try:
            for answer in to_schedule:
                outcome = self._live.resume(answer)
                if outcome is not None:
                    resumed.append((answer, outcome))
                if outcome is None or not outcome.reason:
                    self._queue(answer)
        except BaseException as error:
            self._abandon(live)
            if isinstance(error, RequestTooLarge):
                raise ValidationError(str(error), field=error.field) from error
            raise
        self._metrics.accepted(len(valid.prompt_ids), valid.sampling.max_new_tokens)
        accepted = router_pb2.Accepted(
            input_tokens=len(valid.prompt_ids),
            seed=valid.seed,
            prompt_characters=valid.prompt_characters,
            num_answers=valid.num_given if valid.ranked else len(live.answers),
        )
        sink.send(router_pb2.GenerateEvent(accepted=accepted))
        for answer, outcome in resumed:
            self._delivery.deliver(answer, outcome)
        self._wake.set()
        return live

    def cancel(self, live: LiveRequest) -> None:
        """The client left: memory is freed at once, nothing more is sent. Idempotent."""
        if not live.ended:
            self._drop(live, "dropped")

    def cancel_by_name(self, name: str) -> int:
        """Ends the requests with this request or call id with an error; how many there were."""
        named = {
            answer.live
            for answer in self._live
            if name in (answer.live.valid.request_id, answer.live.valid.call_id)
        }
        for live in named:
            self.fail(live, RequestCancelledError())
        return len(named)

    def fail(self, live: LiveRequest, error: RouterError) -> None:
        """Ends the request with an error event. Idempotent."""
        if not live.ended:
            self._drop(live, error.error_type)
            live.sink.send(router_pb2.GenerateEvent(error=error.to_proto()))

    def fail_all(self, error: RouterError) -> None:
        for answer in self._live:
            self.fail(answer.live, error)

    @property
    def num_live(self) -> int:
        """Answers admitted and not ended, those in validation included."""
        return self._limiter.num_live

    async def drained(self, timeout: float) -> None:
        """Returns when nothing is live any more; after `timeout` seconds ends what still runs."""
        deadline = time.monotonic() + timeout
        while self._limiter.num_live:
            if time.monotonic() >= deadline:
                self.fail_all(DrainingError("The server shut down before the answer was complete"))
                break
            await asyncio.sleep(DRAINED_POLL)
        self._check_books()

    def _check_books(self) -> None:
        """Says whether KV accounting is whole: at the end, when the look delays nobody."""
        if self._scheduler is None:
            return
        try:
            self._scheduler.check_integrity()
        except AssertionError:
            logger.exception("KV accounting is broken")
        else:
            logger.info("KV accounting balances")

    # ----------------------------------------------------------------- groups

    def listen(
        self, on_first_step: Callable[[int], None], on_broken: Callable[[GroupBroken], None]
    ) -> None:
        """`on_first_step(epoch)` when a group has shown that it works; `on_broken` when it died."""
        self._on_first_step, self._on_broken = on_first_step, on_broken

    def attach(self, group: ShardGroup, num_blocks: int) -> None:
        """Serves with this group from now on; requests that were running go on."""
        assert self._task is None, "detach() comes first"
        config = self._config
        if self._scheduler is None:
            self._scheduler = Scheduler(
                SchedulerConfig(
                    num_blocks=num_blocks,
                    block_size=config.block_size,
                    max_batch_prefill_tokens=config.max_batch_prefill_tokens,
                    max_batch_size=config.max_batch_size,
                    max_total_tokens=config.max_total_tokens,
                    kv_overcommit=config.kv_overcommit,
                    prefix_caching=config.prefix_caching,
                    draft_tokens=config.speculate,
                )
            )
            backlog, self._backlog = self._backlog, []
            for answer in backlog:
                if answer.live.ended:
                    continue
                try:
                    self._queue(answer)
                except RequestTooLarge as error:
                    self.fail(answer.live, ValidationError(str(error), field=error.field))
        else:
            for request in self._scheduler.reset(num_blocks):
                found = self._live.get(request.id)
                if found is not None:  # else it went with another of the request
                    self.fail(found.live, GenerationError("the new shards have too little memory"))
        if self._lost_group:
            self._lost_group = False
            self._metrics.value("tgi_group_recoveries").inc()
        group.on_result(self._wake.set)
        self._task = asyncio.get_running_loop().create_task(self._run(group))

    def detach(self) -> None:
        """The group is lost. What ran waits for the next one, unless groups keep dying under it."""
        if self._task is None:
            return
        self._task.cancel()
        self._task = None
        self._lost_group = True
        if self._scheduler is not None:
            self._scheduler.reset()
        for answer in self._live:
            if answer.request.recoveries >= MAX_RECOVERIES:
                self.fail(
                    answer.live,
                    GenerationError(f"{MAX_RECOVERIES} shard groups died while it was running"),
                )

    def refresh_gauges(self) -> None:
        """Brings the metrics that are states, not events, up to date."""
        stats = self._scheduler.stats if self._scheduler is not None else None
        waiting = len(self._backlog)
        self._metrics.take_state(self.num_live, waiting, stats, self._config.block_size)

    # --------------------------------------------------------------- the loop

    async def _run(self, group: ShardGroup) -> None:
        try:
            await self._serve(group)
        except GroupBroken as broken:
            self._broken(broken)
        except ProtocolError as error:
            self._broken(GroupBroken(0, str(error)))
        except Exception:
            # A fault of the router itself: neither the answers in progress nor the books can be
            # trusted, so the next group begins with new ones.
            logger.exception("the engine failed")
            self._scheduler = None
            self.fail_all(InternalError())
            self._broken(GroupBroken(0, "the router's engine failed"))

    def _broken(self, broken: GroupBroken) -> None:
        self.detach()
        self._on_broken(broken)

    async def _serve(self, group: ShardGroup) -> None:
        in_flight: deque[_Step] = deque()
        sequence, worked = 0, False
        while True:
            self._wake.clear()
            while (result := group.receive()) is not None:
                if not worked and not result.refused:
                    worked = True
                    self._on_first_step(group.epoch)
                self._take(in_flight.popleft(), result)
            delay = self._patience(in_flight)
            if not delay and len(in_flight) < MAX_IN_FLIGHT:
                plans: list[StepPlan] = []
                while len(in_flight) < MAX_IN_FLIGHT + self._num_ahead(plans):
                    plan, step = self._plan(group.epoch, sequence + 1)
                    if plan is None or step is None:
                        break
                    sequence += 1
                    in_flight.append(step)
                    plans.append(plan)
                if plans:
                    await group.send(plans)
            await self._woken(delay)

    async def _woken(self, delay: float) -> None:
        """Returns when something has happened; with a `delay`, after so many seconds at most."""
        if not delay:
            await self._wake.wait()
            return
        timer = asyncio.get_running_loop().call_later(delay, self._wake.set)
        await self._wake.wait()
        timer.cancel()

    def _patience(self, in_flight: Sequence[_Step]) -> float:
        """Seconds until the next step should be planned; 0: now, or not before a result."""
        if len(in_flight) != 1 or self._shortest_step < PATIENT_SECONDS or self._is_alone:
            return 0.0
        began = max(in_flight[0].sent, self._last_result)
        return max(began + self._shortest_step * PATIENCE - time.monotonic(), 0.0)

    def _num_ahead(self, plans: Sequence[StepPlan]) -> int:
        """Steps that may follow the `plans` made just now, beyond those that keep shards busy."""
        assert self._scheduler is not None
        if not plans or self._scheduler.planned_prompt or self._scheduler.has_waiting:
            return 0
        seconds = ALONE_AHEAD_SECONDS if self._is_alone else AHEAD_SECONDS
        return min(MAX_AHEAD, int(seconds / max(self._step_seconds, 1e-6)))

    @property
    def _is_alone(self) -> bool:
        """Whether one row at most has run for some time."""
        return time.monotonic() - self._last_company >= ALONE_AFTER

    def _plan(self, epoch: int, sequence: int) -> tuple[StepPlan | None, _Step | None]:
        assert self._scheduler is not None
        started = time.monotonic()
        plan = self._scheduler.schedule(epoch, sequence, started)
        if plan is None:
            return None, None
        now = time.monotonic()
        if len(plan.rows) > 1:
            self._last_company = now
        method = "prefill" if self._scheduler.planned_prompt else "decode"
        joined = len(plan.new_rows) + len(plan.forks)
        self._metrics.step_planned(method, joined, len(plan.rows) > joined, now - started)
        return plan, _Step(sequence, method, now)

    def _take(self, step: _Step, result: StepResult) -> None:
        """A result: tokens go to their clients, what ended is freed."""
        assert self._scheduler is not None
        arrived = time.monotonic()
        outputs = self._scheduler.update(result)
        updated = time.monotonic()
        if result.refused:
            self._refused(step, result)
            return
        self._delivery.deliver_step(outputs, arrived)
        delivered = time.monotonic()
        seconds = StepTimes(
            inference=arrived - max(step.sent, self._last_result),
            forward=result.forward_ns / 1e9,
            decode=delivered - updated,
            filter=updated - arrived,
        )
        self._last_result = arrived
        if result.rows:  # else it was of rows that had ended
            # Up at once, down slowly: what follows a longer step is rather not planned ahead.
            slower = self._step_seconds + (seconds.inference - self._step_seconds) / 8
            self._step_seconds = max(seconds.inference, slower)
            # From nothing it comes to PATIENT_SECONDS within some two dozen longer steps.
            self._shortest_step = min(seconds.inference, self._shortest_step * FORGETTING + 1e-4)
        self._metrics.step_done(step.method, seconds, result.num_drafts)

    def _refused(self, step: _Step, result: StepResult) -> None:
        assert self._scheduler is not None
        self._metrics.step_failed(step.method)
        refusals = self._scheduler.stats.refusals_in_a_row
        logger.warning(
            "a step was refused",
            extra={"fields": {"reason": result.refused, "in_a_row": refusals}},
        )
        if refusals >= MAX_REFUSALS:
            raise GroupBroken(0, f"it refused {refusals} steps in a row: {result.refused}")

    # ------------------------------------------------------------------ books

    def _stop_row(self, row_id: int) -> None:
        """Its text has ended; unknown where it did so at once."""
        if self._scheduler is not None:
            self._scheduler.finish(row_id, "stop_sequence")

    def _queue(self, answer: LiveAnswer) -> None:
        """Raises RequestTooLarge."""
        if self._scheduler is None:
            self._backlog.append(answer)
        else:
            self._scheduler.add(answer.request)

    def _drop(self, live: LiveRequest, cause: str) -> None:
        self._abandon(live)
        self._metrics.failed(cause)
        live.log_end(cause, time.monotonic(), self._config.log_prompts)
        self._wake.set()

    def _abandon(self, live: LiveRequest) -> None:
        """Frees what its answers hold."""
        for answer in live.answers:
            if answer.request.id in self._live:
                if self._scheduler is not None:
                    self._scheduler.cancel(answer.request.id)
                if answer in self._backlog:
                    self._backlog.remove(answer)
                self._live.close(answer)
