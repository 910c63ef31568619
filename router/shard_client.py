"""The router's end of the shard service: dial a group, size its memory, exchange steps, watch it.

A plan goes to every rank; tokens come from rank 0, a refusal or an error from any. Deciding
what a lost group means is group_keeper.py's.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import grpc

from headgate.proto import shard_pb2, shard_pb2_grpc
from headgate.proto.messages import StepPlan, StepResult, decode_result, encode_plan
from headgate.router.shard_group import GroupBroken
from headgate.router.step_stream import GrpcSteps, SocketSteps, StepStream, StreamEnded, describe

T = TypeVar("T")

MAX_MESSAGE_BYTES = 256 << 20
DIAL_PAUSE = 0.05  # seconds between attempts to reach a shard that is not up yet
CALL_TIMEOUT = 5.0  # seconds, of Info and PrepareGrammar
MAX_PREPARED = 32  # grammars that shard 0 is taken to remember: it keeps more
HEARTBEATS_PER_TIMEOUT = 10
MIN_FAILURES = 3  # unanswered heartbeats in a row, however late this process itself was

_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 100),  # a shard that starts is wanted at once
    ("grpc.use_local_subchannel_pool", 1),  # an address may come back under another process
    ("grpc.enable_http_proxy", 0),
]


@dataclass(frozen=True, slots=True)
class GroupFacts:
    """What the shards tell of themselves."""

    vocab_size: int
    eos_token_ids: tuple[int, ...]
    num_blocks: int  # KV blocks allocated on every rank


class ShardClient:
    """One rank."""

    def __init__(self, rank: int, address: str) -> None:
        self.rank = rank
        self._channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
        self._stub = shard_pb2_grpc.ShardStub(self._channel)
        self._steps: StepStream | None = None
        self._steps_path = ""  # of the shard's socket for steps, where it has one

    async def wait_for(self, epoch: int, world_size: int) -> shard_pb2.InfoResponse:
        """Asks until the shard answers as this rank of this epoch; who calls sets the limit."""
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                info = await self._stub.Info(shard_pb2.InfoRequest(), timeout=CALL_TIMEOUT)
                if (info.epoch, info.rank, info.world_size) == (epoch, self.rank, world_size):
                    self._steps_path = info.steps_path
                    return info
            await asyncio.sleep(DIAL_PAUSE)

    async def warm_up(self, max_batch_prefill_tokens: int, max_batch_size: int) -> int:
        """Number of KV blocks that fit. Raises GroupBroken."""
        request = shard_pb2.WarmupRequest(
            max_batch_prefill_tokens=max_batch_prefill_tokens, max_batch_size=max_batch_size
        )
        with self._broken_by_rpc("warm-up"):
            return (await self._stub.Warmup(request)).num_blocks

    async def allocate(self, num_blocks: int) -> None:
        with self._broken_by_rpc("allocation of KV memory"):
            await self._stub.Allocate(shard_pb2.AllocateRequest(num_blocks=num_blocks))

    async def prepare_grammar(self, grammar: str) -> None:
        """Raises grpc.aio.AioRpcError."""
        request = shard_pb2.PrepareGrammarRequest(grammar=grammar)
        await self._stub.PrepareGrammar(request, timeout=CALL_TIMEOUT)

    async def heartbeat(self, timeout: float) -> shard_pb2.HeartbeatResponse:
        """Raises grpc.aio.AioRpcError."""
        return await self._stub.Heartbeat(shard_pb2.HeartbeatRequest(), timeout=timeout)

    async def open_steps(
        self,
        on_result: Callable[[int, shard_pb2.StepResult], None],
        on_broken: Callable[[GroupBroken], None],
    ) -> None:
        """Raises GroupBroken."""
        take = partial(on_result, self.rank)

        def end(cause: str) -> None:
            on_broken(GroupBroken(self.rank, cause))

        if not self._steps_path:
            self._steps = GrpcSteps(self._stub.Steps(), take, end)
            return
        try:
            self._steps = await SocketSteps.open(self._steps_path, take, end)
        except OSError as error:
            raise GroupBroken(self.rank, f"its socket cannot be reached: {error}") from error

    async def send(self, message: shard_pb2.StepPlans) -> None:
        """Raises GroupBroken."""
        assert self._steps is not None
        try:
            await self._steps.send(message)
        except StreamEnded as error:
            raise GroupBroken(self.rank, str(error)) from error

    async def close(self) -> None:
        if self._steps is not None:
            self._steps.close()
        await self._channel.close()

    @contextlib.contextmanager
    def _broken_by_rpc(self, what: str) -> Iterator[None]:
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise GroupBroken(self.rank, f"{what} failed: {describe(error)}") from error


class ShardedClient:
    """All ranks of one epoch: an engine's ShardGroup."""

    def __init__(self, epoch: int, addresses: Sequence[str]) -> None:
        self._epoch = epoch
        self._clients = [ShardClient(rank, address) for rank, address in enumerate(addresses)]
        self._answers: dict[int, list[shard_pb2.StepResult | None]] = {}  # by sequence, by rank
        self._results: deque[StepResult] = deque()
        self._prepared: OrderedDict[str, None] = OrderedDict()  # grammars
        self._preparing = asyncio.Lock()
        self._broken: GroupBroken | None = None
        self._notify: Callable[[], None] = lambda: None

    @property
    def epoch(self) -> int:
        return self._epoch

    async def start(
        self, max_batch_prefill_tokens: int, max_batch_size: int, on_reached: Callable[[], None]
    ) -> GroupFacts:
        """Waits for all ranks, warms them up, allocates, opens the streams. Raises GroupBroken.

        `on_reached` is called when all have answered: from then on they can be watched.
        """
        clients = self._clients
        infos = await _all(client.wait_for(self._epoch, len(clients)) for client in clients)
        on_reached()
        # At once: a warm-up step is collective.
        blocks = await _all(
            client.warm_up(max_batch_prefill_tokens, max_batch_size) for client in clients
        )
        num_blocks = min(blocks)
        if not num_blocks:
            rank = blocks.index(0)
            raise GroupBroken(rank, "there is no memory for a single KV block")
        await _all(client.allocate(num_blocks) for client in clients)
        await _all(client.open_steps(self._take_answer, self._take_broken) for client in clients)
        return GroupFacts(infos[0].vocab_size, tuple(infos[0].eos_token_ids), num_blocks)

    async def prepare_grammar(self, grammar: str) -> None:
        """Has shard 0 compile it, one at a time. Where that fails, the row's step does it."""
        if grammar not in self._prepared:
            async with self._preparing:
                call = asyncio.ensure_future(self._clients[0].prepare_grammar(grammar))
                await asyncio.wait((call,))  # a group that is left cancels it, not its callers
                if not call.cancelled():
                    call.exception()
        self._prepared[grammar] = None
        self._prepared.move_to_end(grammar)
        if len(self._prepared) > MAX_PREPARED:
            self._prepared.popitem(last=False)

    async def send(self, plans: Sequence[StepPlan]) -> None:
        """To every rank, in one message. Raises GroupBroken."""
        if self._broken is not None:
            raise self._broken
        message = shard_pb2.StepPlans(plans=[encode_plan(plan) for plan in plans])
        for plan in plans:
            self._answers[plan.sequence] = [None] * len(self._clients)
        for client in self._clients:
            await client.send(message)

    def receive(self) -> StepResult | None:
        """The next result that all ranks have answered, if any. Raises GroupBroken."""
        if self._results:
            return self._results.popleft()
        if self._broken is not None:
            raise self._broken
        return None

    def on_result(self, callback: Callable[[], None]) -> None:
        self._notify = callback

    async def watch(self, timeout: float) -> GroupBroken:
        """Returns when a shard is hung: no answer, or busy without progress, for `timeout` s."""
        watches = [RankWatch(client, self._epoch, timeout) for client in self._clients]
        tasks = [asyncio.ensure_future(watch.run()) for watch in watches]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
        # Where one shard is silent, the others stall for its sake.
        silent = next((watch for watch in watches if watch.silent_since is not None), None)
        if silent is not None:
            return silent.no_heartbeat()
        # GPUs that wait for each other's tensors stand still together: all are told.
        verdict = done.pop().result()
        stalled = ", ".join(str(watch.rank) for watch in watches if watch.stalled)
        alike = f" (shards {stalled} alike)" if "," in stalled else ""
        return GroupBroken(verdict.rank, verdict.reason + alike)

    async def close(self) -> None:
        await asyncio.gather(*(client.close() for client in self._clients))

    def _take_answer(self, rank: int, message: shard_pb2.StepResult) -> None:
        answers = self._answers.get(message.sequence)
        if answers is None or answers[rank] is not None or message.epoch != self._epoch:
            self._take_broken(GroupBroken(rank, f"it answered no plan: {message.sequence}"))
            return
        answers[rank] = message
        if None in answers:
            return
        del self._answers[message.sequence]
        self._results.append(_merge([answer for answer in answers if answer is not None]))
        self._notify()

    def _take_broken(self, broken: GroupBroken) -> None:
        if self._broken is None:
            self._broken = broken
            self._notify()


def _merge(answers: list[shard_pb2.StepResult]) -> StepResult:
    """Rank 0's result, refused if any rank refused."""
    result = decode_result(answers[0])
    refused = next((answer.refused for answer in answers if answer.refused), "")
    return replace(result, refused=refused) if refused != result.refused else result


class RankWatch:
    """Asks one shard for its heartbeat. Both limits count from the first sign of trouble, so a
    pause of this process is none."""

    def __init__(self, client: ShardClient, epoch: int, timeout: float) -> None:
        self.silent_since: float | None = None  # when it was asked and first did not answer
        self._stalled_since: float | None = None
        self._client = client
        self._epoch = epoch
        self._timeout = timeout
        self._failures = 0
        self._beats = -1

    async def run(self) -> GroupBroken:
        """Returns when the shard is hung."""
        while True:
            await asyncio.sleep(self._timeout / HEARTBEATS_PER_TIMEOUT)
            verdict = await self._ask()
            if verdict is not None:
                return verdict

    @property
    def rank(self) -> int:
        return self._client.rank

    @property
    def stalled(self) -> bool:
        """Whether it is busy and has made no progress lately."""
        return self._stalled_since is not None

    def no_heartbeat(self) -> GroupBroken:
        return GroupBroken(self._client.rank, f"no heartbeat for {self._timeout:g} s")

    async def _ask(self) -> GroupBroken | None:
        asked = time.monotonic()
        try:
            answer = await self._client.heartbeat(self._timeout / MIN_FAILURES)
        except grpc.aio.AioRpcError:
            if self.silent_since is None:
                self.silent_since = asked
            self._failures += 1
            over = time.monotonic() - self.silent_since >= self._timeout
            return self.no_heartbeat() if over and self._failures >= MIN_FAILURES else None
        self.silent_since, self._failures = None, 0
        rank, busy = self._client.rank, answer.busy
        if answer.epoch != self._epoch:
            return GroupBroken(rank, f"it is of epoch {answer.epoch}, not {self._epoch}")
        if not busy or answer.beats != self._beats:
            self._beats, self._stalled_since = answer.beats, None
            return None
        if self._stalled_since is None:
            self._stalled_since = asked
        if time.monotonic() - self._stalled_since >= self._timeout:
            return GroupBroken(rank, f"no progress in a step for {self._timeout:g} s")
        return None


async def _all(awaitables: Iterable[Awaitable[T]]) -> list[T]:
    """Results in order; the first error cancels the rest."""
    tasks = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
