"""Shard servers without a model, in this process: fake_shard.py behind the real gRPC service.

A `FakeGroup` is one epoch of them, a `FakeLauncher` the other end of the control socket, and
`running_router` a whole router between the two.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
from tokenizers import Tokenizer as Backend

from headgate.proto import router_pb2_grpc, shard_pb2, shard_pb2_grpc
from headgate.proto.framing import frame, read_message, stream_path
from headgate.proto.messages import RowEnd, StepPlan, StepResult, decode_plan, encode_result
from headgate.router.config import RouterConfig
from headgate.router.control import ControlClient
from headgate.router.group_keeper import GroupKeeper
from headgate.router.server import Parts, RouterServer
from headgate.router.tokenizer import ChatFiles, Tokenizer
from tests.unit import tokenizers_for_tests as made
from tests.unit.fake_shard import FakeShard

BLOCK_SIZE = 4
EOS = 0


@dataclass
class Behaviour:
    """How the shards of a group behave; may be changed while they run."""

    step_seconds: float = 0.0
    num_blocks: int = 256
    vocabulary: int = 250
    refuse_above: int = 0
    refuse: bool = False  # every plan
    refuse_once: set[int] = field(default_factory=set)  # these ranks, their next plan
    hung: bool = False  # no heartbeats, no results
    hangs_in_warmup: bool = False
    stalled: bool = False  # heartbeats, but no progress
    fails_grammars: bool = False  # rows with one end FAILED at their first token
    has_socket: bool = True  # for steps; else they come by gRPC
    gate: asyncio.Event = field(default_factory=asyncio.Event)  # closed: steps wait

    def __post_init__(self) -> None:
        self.gate.set()


class FakeShardServer(shard_pb2_grpc.ShardServicer):
    """One rank."""

    def __init__(self, epoch: int, rank: int, world_size: int, behaviour: Behaviour) -> None:
        self._identity = (epoch, rank, world_size)
        self._behaviour = behaviour
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        self._socket: asyncio.Server | None = None  # for steps
        self._connections: set[asyncio.StreamWriter] = set()
        self._steps_path = ""
        shard_pb2_grpc.add_ShardServicer_to_server(self, self._server)
        self.shard = self._new_shard(behaviour.num_blocks)
        self.warmups: list[shard_pb2.WarmupRequest] = []
        self.prepared: list[str] = []  # grammars
        self.messages: list[int] = []  # plans in each

    async def start(self, address: str) -> None:
        if self._behaviour.has_socket:
            self._steps_path = stream_path(address)
            self._socket = await asyncio.start_unix_server(self._serve, self._steps_path)
        self._server.add_insecure_port(address)
        await self._server.start()

    async def kill(self) -> None:
        if self._socket is not None:
            self._socket.close()
        for connection in self._connections:
            connection.close()
        await self._server.stop(None)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(writer)
        with contextlib.suppress(ConnectionError):
            async for result in self.Steps(_messages(reader), None):
                writer.write(frame(result))
                await writer.drain()
        self._connections.discard(writer)
        writer.close()

    def _new_shard(self, num_blocks: int) -> FakeShard:
        return FakeShard(
            num_blocks, BLOCK_SIZE, self._behaviour.vocabulary, EOS, epoch=self._identity[0]
        )

    async def Info(self, request: Any, context: Any) -> shard_pb2.InfoResponse:
        epoch, rank, world_size = self._identity
        return shard_pb2.InfoResponse(
            epoch=epoch,
            rank=rank,
            world_size=world_size,
            vocab_size=self._behaviour.vocabulary,
            block_size=BLOCK_SIZE,
            eos_token_ids=[EOS],
            steps_path=self._steps_path,
        )

    async def Warmup(self, request: Any, context: Any) -> shard_pb2.WarmupResponse:
        self.warmups.append(request)
        if self._behaviour.hangs_in_warmup:
            self._behaviour.hung = True
        while self._behaviour.hung:
            await asyncio.sleep(0.01)
        return shard_pb2.WarmupResponse(num_blocks=self._behaviour.num_blocks + self._identity[1])

    async def Allocate(self, request: Any, context: Any) -> shard_pb2.AllocateResponse:
        self.shard = self._new_shard(request.num_blocks)
        return shard_pb2.AllocateResponse()

    async def PrepareGrammar(self, request: Any, context: Any) -> shard_pb2.PrepareGrammarResponse:
        self.prepared.append(request.grammar)
        return shard_pb2.PrepareGrammarResponse()

    async def Heartbeat(self, request: Any, context: Any) -> shard_pb2.HeartbeatResponse:
        while self._behaviour.hung:
            await asyncio.sleep(0.01)
        return shard_pb2.HeartbeatResponse(
            epoch=self._identity[0], beats=self.shard.steps, busy=self._behaviour.stalled
        )

    async def Steps(
        self, request_iterator: AsyncIterator[shard_pb2.StepPlans], context: Any
    ) -> AsyncIterator[shard_pb2.StepResult]:
        self.shard = self._new_shard(self.shard.num_blocks)
        async for message in self._plans(request_iterator):
            behaviour = self._behaviour
            if behaviour.step_seconds:
                await asyncio.sleep(behaviour.step_seconds)
            await behaviour.gate.wait()
            while behaviour.hung:
                await asyncio.sleep(0.01)
            self.shard.refuse_above = behaviour.refuse_above
            if self._identity[1] in behaviour.refuse_once:
                behaviour.refuse_once.remove(self._identity[1])
                self.shard.refuse = True
            plan = decode_plan(message)
            if behaviour.refuse:
                result = StepResult(plan.epoch, plan.sequence, refused="it does not want to")
                self.shard.sequence = plan.sequence
            else:
                result = self.shard.execute(plan)
                if behaviour.fails_grammars:
                    result = _failed(plan, result)
            if self._identity[1]:  # only rank 0 fills results
                result = StepResult(result.epoch, result.sequence, refused=result.refused)
            yield encode_result(result)

    async def _plans(
        self, messages: AsyncIterator[shard_pb2.StepPlans]
    ) -> AsyncIterator[shard_pb2.StepPlan]:
        async for message in messages:
            self.messages.append(len(message.plans))
            for plan in message.plans:
                yield plan


async def _messages(reader: asyncio.StreamReader) -> AsyncIterator[shard_pb2.StepPlans]:
    while (message := await read_message(reader, shard_pb2.StepPlans())) is not None:
        yield message


def _failed(plan: StepPlan, result: StepResult) -> StepResult:
    """Rows with a grammar that are new end FAILED."""
    bound = {row.id for row in plan.new_rows if row.sampling.grammar}
    ends = [
        RowEnd.FAILED if row in bound else end
        for row, end in zip(result.rows, result.ends, strict=True)
    ]
    failures = {row: "it leads nowhere" for row in result.rows if row in bound}
    return replace(result, ends=ends, failures=failures)


class FakeGroup:
    """All ranks of one epoch."""

    def __init__(self, epoch: int, num_shards: int, behaviour: Behaviour) -> None:
        self.epoch = epoch
        self.servers = [
            FakeShardServer(epoch, rank, num_shards, behaviour) for rank in range(num_shards)
        ]
        self.addresses: list[str] = []

    async def start(self, directory: Path) -> None:
        for rank, server in enumerate(self.servers):
            address = f"unix:{directory}/shard-{self.epoch}-{rank}.sock"
            await server.start(address)
            self.addresses.append(address)

    async def kill(self) -> None:
        for server in self.servers:
            await server.kill()


class FakeLauncher:
    """Listens on the control socket, starts groups, remembers what the router says."""

    def __init__(self, directory: Path, num_shards: int, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.heard: list[dict[str, Any]] = []
        self.group: FakeGroup | None = None
        self._directory = directory
        self._num_shards = num_shards
        self._epoch = 0
        self._writer: asyncio.StreamWriter | None = None
        self._server: asyncio.Server | None = None

    async def listen(self) -> str:
        path = str(self._directory / "control.sock")
        self._server = await asyncio.start_unix_server(self._serve, path)
        return path

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        while line := await reader.readline():
            self.heard.append(json.loads(line))

    def tell(self, event: str, **fields: Any) -> None:
        assert self._writer is not None
        self._writer.write(json.dumps({"event": event, **fields}).encode() + b"\n")

    async def start_group(self, announce: bool = True) -> FakeGroup:
        self._epoch += 1
        self.group = FakeGroup(self._epoch, self._num_shards, self.behaviour)
        await self.group.start(self._directory)
        if announce:
            self.tell("group", epoch=self._epoch, addresses=self.group.addresses)
        return self.group

    async def kill_group(self, tell: bool = True) -> None:
        assert self.group is not None
        await self.group.kill()
        if tell:
            self.tell("group_lost", epoch=self.group.epoch, reason="shard 0 was killed by SIGKILL")

    async def restart_group(self) -> None:
        await self.kill_group()
        await self.start_group()

    def said(self, event: str) -> list[dict[str, Any]]:
        return [heard for heard in self.heard if heard["event"] == event]

    async def close(self) -> None:
        if self.group is not None:
            await self.group.kill()
        if self._server is not None:
            self._server.close()
        if self._writer is not None:
            self._writer.close()


@dataclass
class RunningRouter:
    """A router with its surroundings, ready to serve."""

    parts: Parts
    launcher: FakeLauncher
    channel: grpc.aio.Channel
    stub: router_pb2_grpc.RouterStub
    keeping: asyncio.Future[None]  # the group keeper
    unix: str
    port: int

    @property
    def behaviour(self) -> Behaviour:
        return self.launcher.behaviour

    def metric(self, sample: str) -> float:
        """The value of `name` or `name{labels}`."""
        self.parts.engine.refresh_gauges()
        for line in self.parts.metrics.render().decode().splitlines():
            name, _, value = line.rpartition(" ")
            if name == sample:
                return float(value)
        raise KeyError(sample)

    def assert_idle(self) -> None:
        """Everything was given back, and the books balance."""
        assert self.parts.engine.num_live == 0
        scheduler = self.parts.engine._scheduler
        assert scheduler is not None
        scheduler.check_integrity()
        assert scheduler.stats.blocks_used == 0


def router_config(directory: Path, **changes: Any) -> RouterConfig:
    config = RouterConfig(
        model_path=str(directory),
        model_id="test/model",
        served_model_name="test-model",
        control_address=str(directory / "control.sock"),
        gateway_address=f"unix:{directory}/router.sock",
        grpc_host="127.0.0.1",
        grpc_port=0,
        max_input_tokens=100,
        max_total_tokens=160,
        max_batch_prefill_tokens=32,
        block_size=BLOCK_SIZE,
        heartbeat_timeout=5.0,
    )
    return replace(config, **changes)


@contextlib.asynccontextmanager
async def running_router(
    directory: Path,
    *,
    behaviour: Behaviour | None = None,
    num_shards: int = 2,
    ready: bool = True,
    backend: Backend | None = None,
    **changes: Any,
) -> AsyncIterator[RunningRouter]:
    """`changes` are of the RouterConfig; `ready=False`: no group is started."""
    launcher = FakeLauncher(directory, num_shards, behaviour or Behaviour())
    await launcher.listen()
    config = router_config(directory, num_shards=num_shards, **changes)
    tokenizer = Tokenizer(backend or made.byte_level(), workers=1)
    parts = Parts.build(
        config, tokenizer, ChatFiles("{{ messages }}", bos_token="<s>", eos_token="</s>")
    )
    server = RouterServer(parts)
    await server.start()
    control = await ControlClient.connect(config.control_address)
    keeper = GroupKeeper(
        config, parts.engine, parts.status, parts.validator, parts.outputs, control
    )
    tasks = [asyncio.ensure_future(keeper.run()), asyncio.ensure_future(server.follow_status())]
    channel = grpc.aio.insecure_channel(config.gateway_address)
    stub = router_pb2_grpc.RouterStub(channel)
    try:
        await until(lambda: launcher._writer is not None)
        if ready:
            await launcher.start_group()
            await until(lambda: bool(launcher.said("ready")))
        yield RunningRouter(
            parts, launcher, channel, stub, tasks[0], config.gateway_address, server.port
        )
    finally:
        launcher.behaviour.hung = False
        launcher.behaviour.gate.set()
        await channel.close()
        for task in tasks:
            task.cancel()
        await server.stop(0)
        await keeper.close()
        await control.close()
        await launcher.close()
        tokenizer.close()


async def until(condition: Callable[[], bool], timeout: float = 10.0) -> None:
    """Returns when `condition()` holds; fails after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        await asyncio.sleep(0.005)
