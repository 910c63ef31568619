"""Follows the launcher's word on shard groups: brings each new one into service, reports what dies.

The engine computes, the launcher starts and kills; this is the state between them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from headgate.router.config import RouterConfig
from headgate.router.control import ControlClient, Event
from headgate.router.engine import Engine
from headgate.router.errors import UnavailableError
from headgate.router.output_processor import OutputProcessor
from headgate.router.shard_client import GroupFacts, ShardedClient
from headgate.router.shard_group import GroupBroken
from headgate.router.status import DRAINING, FAILED, LOADING, READY, RECOVERING, ServerStatus
from headgate.router.validation import Validator

logger = logging.getLogger(__name__)

FLUSH_TIME = 0.1  # seconds that the last events get to reach their clients
RESUBMIT_TIME = 2.0  # seconds within which gateways find a router that was started again


class NotEnoughMemory(Exception):
    """The shards cannot hold one request of the promised length. One sentence for the user."""


class GroupKeeper:
    def __init__(
        self,
        config: RouterConfig,
        engine: Engine,
        status: ServerStatus,
        validator: Validator,
        outputs: OutputProcessor,
        control: ControlClient,
    ) -> None:
        self._config = config
        self._engine = engine
        self._status = status
        self._validator = validator
        self._outputs = outputs
        self._control = control
        self._group: ShardedClient | None = None
        self._tasks: list[asyncio.Task[None]] = []  # of this group: bring-up, watch
        self._background: set[asyncio.Task[None]] = set()
        self._served = False  # some group has
        self._fatal: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        engine.listen(self._on_first_step, self._on_broken)

    async def run(self) -> None:
        """Until the launcher goes. Raises NotEnoughMemory."""
        events = asyncio.ensure_future(self._follow())
        await asyncio.wait((events, self._fatal), return_when=asyncio.FIRST_COMPLETED)
        if self._fatal.done():
            events.cancel()
            self._fatal.result()
        events.result()

    async def close(self) -> None:
        self._leave_group()
        for task in list(self._background):
            await asyncio.wait((task,), timeout=1)

    async def _follow(self) -> None:
        handlers: dict[str, Callable[[Event], None]] = {
            "group": self._on_group,
            "group_lost": self._on_group_lost,
            "drain": lambda event: self._spawn(self._drain(float(event.get("timeout", 0)))),
            "failed": lambda event: self._spawn(self._fail(str(event.get("message", "")))),
        }
        async for event in self._control.events():
            handler = handlers.get(event["event"])
            if handler is None:
                logger.error("unknown event %r from the launcher", event["event"])
                continue
            try:
                handler(event)
            except (KeyError, TypeError, ValueError):
                logger.exception("a malformed event from the launcher: %r", event)

    # ----------------------------------------------------------------- events

    def _on_group(self, event: Event) -> None:
        epoch, addresses = int(event["epoch"]), list(event["addresses"])
        self._leave_group()
        self._group = ShardedClient(epoch, addresses)
        self._status.epoch = epoch
        self._status.set(
            RECOVERING if self._served else LOADING, f"waiting for {len(addresses)} shards"
        )
        self._tasks.append(self._task(self._unfailing(self._bring_up, self._group)))

    def _on_group_lost(self, event: Event) -> None:
        if self._group is None or self._group.epoch != int(event["epoch"]):
            return
        self._lose(str(event.get("reason", "")))

    async def _drain(self, timeout: float) -> None:
        self._status.set(DRAINING, "shutting down")
        if not self._served:  # an earlier router has: what it left unfinished is on its way here
            await asyncio.sleep(min(RESUBMIT_TIME, timeout))
        await self._engine.drained(timeout)
        await asyncio.sleep(FLUSH_TIME)
        self._control.send("drained")

    async def _fail(self, message: str) -> None:
        self._leave_group()
        self._status.set(FAILED, message)
        self._validator.give_up()
        self._engine.fail_all(UnavailableError(message))
        await asyncio.sleep(FLUSH_TIME)
        self._control.send("failed_delivered")

    # ------------------------------------------------------------ group's life

    async def _unfailing(
        self, work: Callable[[ShardedClient], Coroutine[Any, Any, None]], group: ShardedClient
    ) -> None:
        """A group that is not brought up or not watched must not look as if it were."""
        try:
            await work(group)
        except Exception as error:
            logger.exception("a group cannot be served")
            if self._group is group:
                self._on_broken(GroupBroken(0, f"the router failed: {error}"))

    async def _bring_up(self, group: ShardedClient) -> None:
        config = self._config

        def reached() -> None:
            self._status.set(RECOVERING if self._served else LOADING, "warming up")
            self._tasks.append(self._task(self._unfailing(self._watch, group)))

        try:
            facts = await group.start(
                config.max_batch_prefill_tokens, config.max_batch_size, reached
            )
            self._check_memory(facts)
        except GroupBroken as broken:
            self._on_broken(broken)
            return
        except NotEnoughMemory as error:
            if not self._fatal.done():
                self._fatal.set_exception(error)
            return
        self._validator.hear(facts.vocab_size, facts.eos_token_ids, group.prepare_grammar)
        self._outputs.eos_token_ids = frozenset(facts.eos_token_ids)
        self._status.max_batch_total_tokens = facts.num_blocks * config.block_size
        self._engine.attach(group, facts.num_blocks)
        self._served = True
        self._status.set(READY)
        self._control.send(
            "ready",
            epoch=group.epoch,
            model_id=config.model_id,
            max_total_tokens=config.max_total_tokens,
        )

    def _check_memory(self, facts: GroupFacts) -> None:
        there = facts.num_blocks * self._config.block_size
        if there < self._config.max_total_tokens:
            raise NotEnoughMemory(
                f"Not enough memory to handle `max_total_tokens={self._config.max_total_tokens}`: "
                f"the KV cache holds {there} tokens"
            )

    async def _watch(self, group: ShardedClient) -> None:
        hung = await group.watch(self._config.heartbeat_timeout)
        logger.error("shard %d hangs: %s", hung.rank, hung.reason)
        self._control.send("shard_hung", epoch=group.epoch, rank=hung.rank, reason=hung.reason)
        self._lose(f"shard {hung.rank}: {hung.reason}")

    def _on_first_step(self, epoch: int) -> None:
        self._control.send("step", epoch=epoch)

    def _on_broken(self, broken: GroupBroken) -> None:
        if self._group is None:
            return
        logger.warning("shard %d failed: %s", broken.rank, broken.reason)
        self._control.send(
            "shard_failed", epoch=self._group.epoch, rank=broken.rank, reason=broken.reason
        )
        self._lose(f"shard {broken.rank}: {broken.reason}")

    def _lose(self, reason: str) -> None:
        """Requests wait from here until the launcher announces another group."""
        self._status.set(RECOVERING if self._served else LOADING, reason)
        self._leave_group()

    def _leave_group(self) -> None:
        self._engine.detach()
        group, self._group = self._group, None
        tasks, self._tasks = self._tasks, []
        current = asyncio.current_task()
        for task in tasks:
            if task is not current:
                task.cancel()
        if group is not None:
            self._spawn(group.close())

    # ------------------------------------------------------------------ tasks

    def _task(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine)
        task.add_done_callback(_log_failure)
        return task

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self._task(coroutine)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        logger.error("a task failed", exc_info=task.exception())
