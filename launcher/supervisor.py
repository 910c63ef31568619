"""The life of a server: what is started when, what is restarted, and how it all ends.

Order: port, gateways (HTTP answers at once), model files, sizes, router and shards. It knows
processes only; requests are the router's.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

from headgate.launcher.autosize import Sizes, describe, work_out_sizes
from headgate.launcher.child_configs import gateway_config, router_config, shard_config
from headgate.launcher.config import LauncherConfig
from headgate.launcher.control import ControlServer, Event
from headgate.launcher.errors import LaunchError
from headgate.launcher.greeting import environment_report, first_request
from headgate.launcher.hardware import Hardware, find_hardware
from headgate.launcher.log_output import LogOutput
from headgate.launcher.model_facts import read_model_facts
from headgate.launcher.model_files import (
    ModelFiles,
    ModelSource,
    check_paths,
    files_at_hand,
    find_source,
    read_files,
    with_weights_of,
    write_source,
)
from headgate.launcher.ports import bind_http, check_port, reserve_port
from headgate.launcher.process import CONFIGURATION_ERROR, Child, Exit, Reaper
from headgate.launcher.restart_policy import RestartPolicy, start_limit
from headgate.launcher.run_directory import RunDirectory
from headgate.launcher.shard_group import Loss, ShardGroup
from headgate.launcher.spawner import Spawner

STOP_SECONDS = 5.0  # between SIGTERM and SIGKILL, once nothing runs any more
FAILED_SECONDS = 2.5  # for the router to give its clients their answers before the end
BROKEN_STREAM_SECONDS = 1.0  # how long a shard that the router lost may take to be seen dead


def serve(config: LauncherConfig, output: LogOutput, run: RunDirectory | None = None) -> int:
    """Runs a server until it is asked to stop (0) or cannot go on (1).

    Without gateways it opens no port at all: its one door is the router's socket in `run`.
    """
    return asyncio.run(Supervisor(config, output, run).run())


class Supervisor:
    """One server. `run` is its whole life."""

    def __init__(
        self, config: LauncherConfig, output: LogOutput, run: RunDirectory | None = None
    ) -> None:
        self._config = config
        self._output = output
        self._started = time.monotonic()
        self._reaper = Reaper()
        self._spawn = Spawner(config, self._reaper, output.child_line)
        self._run = run or RunDirectory()
        self._control = ControlServer(self._run.control_socket, self._heard, self._router_came)
        self._listener: socket.socket | None = None
        self._grpc_port = 0
        self._gateways: dict[int, Child] = {}
        self._router: Child | None = None
        self._group: ShardGroup | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._group_policy = RestartPolicy()
        self._router_policy = RestartPolicy()
        self._slowest_start = 0.0  # seconds, of a group
        self._was_ready = False
        self._drain_timeout: float | None = None
        self._stop_asked = asyncio.Event()
        self._stop_now = asyncio.Event()
        self._drained = asyncio.Event()
        self._failure_told = asyncio.Event()

    # ------------------------------------------------------------------ life

    async def run(self) -> int:
        """The exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._signalled, number)
        self._reaper.install()
        self._fatal: asyncio.Future[None] = loop.create_future()
        self._keep(self._start())
        try:
            await _first([self._fatal, self._stop_asked])
            if self._fatal.done():
                self._fatal.result()  # raises why
            if self._was_ready:
                await self._drain()
            return 0
        except LaunchError as error:
            await self._tell_failure(str(error))
            return 1
        except Exception as error:  # a bug, or the machine failing us: nothing may be left running
            self._output.fatal(f"The launcher itself failed: {type(error).__name__}: {error}")
            raise
        finally:
            await self._end()

    async def _start(self) -> None:
        """Starts everything; what it started lives on. Raises LaunchError."""
        config, output = self._config, self._output
        for warning in config.warnings:
            output.warn(warning)
        hardware = find_hardware()
        if config.env:
            output.block("Environment", environment_report(hardware))
        check_paths(config)
        source = find_source(config)
        files = files_at_hand(source, config.weights_cache_override)
        sizes = self._work_out(files, hardware) if files else None
        self._run.write_status("loading", "starting")
        if config.gateway_workers:
            self._open_ports()
            self._start_gateways(hardware)
        if files is None:
            files = await self._prepare(source)
        sizes = sizes or self._work_out(files, hardware)
        if config.weights_cache_override:
            files = with_weights_of(files, config.weights_cache_override, self._run.path / "model")
        output.info(f"Loading {config.served_model_name or files.model_id} from {files.path}")
        self._run.write_status("loading", f"loading {files.model_id}")
        self._files = files
        self._sizes = sizes
        self._run.write_config("shard", shard_config(config, sizes, files, self._run))
        self._run.write_config(
            "router", router_config(config, sizes, files, self._run, self._grpc_port)
        )
        await self._control.start()
        self._keep(self._keep_router())
        self._keep(self._keep_group())

    def _work_out(self, files: ModelFiles, hardware: Hardware) -> Sizes:
        """Sizes of the server, printed. Raises LaunchError."""
        model = read_model_facts(
            Path(files.path),
            weights=self._config.weights_cache_override,
            own_module=bool(self._config.model_module),
        )
        sizes = work_out_sizes(model, self._config, hardware)
        for warning in sizes.warnings:
            self._output.warn(warning)
        self._output.block(f"Sizes for {files.model_id}", describe(sizes, model, hardware))
        return sizes

    def _open_ports(self) -> None:
        config = self._config
        self._listener = bind_http(config.hostname, config.port)
        self._port = int(self._listener.getsockname()[1])
        if config.grpc_port is None and self._port == 65535:
            raise LaunchError("There is no port after 65535 for gRPC: give --grpc-port.")
        self._grpc_port = self._port + 1 if config.grpc_port is None else config.grpc_port
        check_port(config.grpc_hostname, self._grpc_port, "--grpc-hostname", "--grpc-port")

    async def _prepare(self, source: ModelSource) -> ModelFiles:
        """Has a child download and convert. Raises LaunchError with the child's sentence."""
        self._run.write_status("downloading", f"getting {source.model_id} ready")
        request, answer = self._run.path / "source.json", self._run.path / "model.json"
        write_source(source, request)
        child = self._spawn.model(request, answer)
        end = await child.wait()
        if end.code != 0 or not answer.exists():
            raise LaunchError(child.final_sentence(end))
        return read_files(answer)

    # -------------------------------------------------------------- children

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs `work` beside the rest; what it raises ends the server."""
        task = asyncio.create_task(work)
        self._tasks.add(task)

        def finished(done: asyncio.Task[None]) -> None:
            self._tasks.discard(done)
            if not done.cancelled() and (error := done.exception()) and not self._fatal.done():
                self._fatal.set_exception(error)

        task.add_done_callback(finished)

    def _start_gateways(self, hardware: Hardware) -> None:
        values = gateway_config(self._config, hardware, self._run, self._port)
        path = self._run.write_config("gateway", values)
        for index in range(self._config.gateway_workers):
            self._keep(self._keep_gateway(index, path))

    async def _keep_gateway(self, index: int, path: Path) -> None:
        policy = RestartPolicy()
        assert self._listener is not None
        while True:
            child = self._spawn.gateway(index, path, self._listener.fileno())
            self._gateways[index] = child
            end = await child.wait()
            await self._survive(child, end, policy)

    async def _keep_router(self) -> None:
        while True:
            child = self._router = self._spawn.router(self._run.path / "router.json")
            end = await child.wait()
            if not self._was_ready:
                self._last_words(child, end)
                raise LaunchError(child.final_sentence(end))
            await self._survive(child, end, self._router_policy)

    async def _survive(self, child: Child, end: Exit, policy: RestartPolicy) -> None:
        """Waits before a router or gateway is started again. Raises LaunchError if it shan't be."""
        lived = time.monotonic() - child.started
        delay = None if end.code == CONFIGURATION_ERROR else policy.death(lived)
        if delay is None:
            self._last_words(child, end)
            raise LaunchError(child.final_sentence(end))
        self._output.warn(f"{child.name} {end}: starting it again in {delay:g} s")
        await asyncio.sleep(delay)

    async def _keep_group(self) -> None:
        epoch = 0
        while True:
            epoch += 1
            self._group = self._start_group(epoch)
            self._control.send("group", epoch=epoch, addresses=self._group.addresses)
            loss = await self._group.lost()
            delay = self._after_loss(self._group, loss)
            self._run.write_status("recovering", loss.reason)
            self._control.send("group_lost", epoch=epoch, reason=loss.reason)
            self._output.warn(
                f"{loss.reason}: starting the shards again in {delay:g} s", epoch=epoch
            )
            self._group = None
            await asyncio.sleep(delay)

    def _after_loss(self, group: ShardGroup, loss: Loss) -> float:
        """Seconds until the next try. Raises LaunchError where there is none."""
        if loss.child is not None and loss.end is not None:
            self._last_words(loss.child, loss.end)
        if loss.is_final or not self._was_ready:
            raise LaunchError(loss.sentence)
        delay = self._group_policy.death(group.served_seconds)
        if delay is None:
            raise LaunchError(
                f"The shards were lost {self._group_policy.deaths} times without a step between; "
                f"the last time {loss.sentence}"
            )
        return delay

    def _start_group(self, epoch: int) -> ShardGroup:
        config, world = self._config, self._sizes.num_shard
        port = config.master_port if epoch == 1 and world > 1 else None
        # A bare container may have no /etc/hosts to look "localhost" up in.
        host = "127.0.0.1" if config.master_addr == "localhost" else config.master_addr
        meeting = reserve_port(host, port or 0, "--master-addr", "--master-port")
        path = self._run.path / "shard.json"
        master = (host, int(meeting.getsockname()[1]))
        addresses = [
            self._run.shard_address(config.shard_uds_path, rank).replace("{epoch}", str(epoch))
            for rank in range(world)
        ]

        def spawn(rank: int, epoch: int) -> Child:
            return self._spawn.shard(path, rank, world, epoch, master)

        deaths = self._group_policy.deaths
        limit = start_limit(config.startup_timeout, self._slowest_start, deaths)
        return ShardGroup(epoch, addresses, spawn, limit, config.heartbeat_timeout, meeting)

    def _last_words(self, child: Child, end: Exit) -> None:
        if end.code != CONFIGURATION_ERROR and child.last_words:
            lines = "\n".join(f"    {line}" for line in child.last_words)
            self._output.log("error", f"{child.name} {end}; its last lines were:\n{lines}")

    # --------------------------------------------------------------- control

    def _router_came(self) -> None:
        """A router connected: tell it how things stand."""
        if self._group is not None:
            self._control.send("group", epoch=self._group.epoch, addresses=self._group.addresses)
        if self._drain_timeout is not None:
            self._control.send("drain", timeout=self._drain_timeout)

    def _heard(self, event: Event) -> None:
        kind, group = event["event"], self._group
        if kind == "drained":
            self._drained.set()
        elif kind == "failed_delivered":
            self._failure_told.set()
        if group is None or event.get("epoch") != group.epoch:
            return  # of a group that is gone
        if kind == "ready":
            self._ready(group)
        elif kind == "step":
            self._group_policy.reset()
            self._router_policy.reset()
        elif kind == "shard_hung":
            group.blame(f"shard-{event.get('rank')} hangs ({event.get('reason')})")
        elif kind == "shard_failed":
            reason = f"the router lost shard-{event.get('rank')} ({event.get('reason')})"
            asyncio.get_running_loop().call_later(BROKEN_STREAM_SECONDS, group.blame, reason)

    def _ready(self, group: ShardGroup) -> None:
        group.mark_ready()
        self._slowest_start = max(self._slowest_start, group.start_seconds)
        if self._drain_timeout is not None:
            return
        self._run.write_status("ready")
        if self._was_ready:
            self._output.info("Serving again", epoch=group.epoch)
            return
        self._was_ready = True
        seconds = time.monotonic() - self._started
        name = self._config.served_model_name or self._files.model_id
        if not self._config.gateway_workers:
            self._output.info(f"Ready in {seconds:.1f} s: {name}")
            return
        url, request = first_request(self._config, self._port, self._files)
        self._output.info(
            f"Ready in {seconds:.1f} s: {name} at {url} (gRPC at "
            f"{self._config.grpc_hostname}:{self._grpc_port})"
        )
        self._output.info(f"Try: {request}")

    # ------------------------------------------------------------------- end

    def _signalled(self, number: signal.Signals) -> None:
        if self._stop_asked.is_set():
            self._stop_now.set()
            return
        self._output.info(f"{signal.Signals(number).name}: stopping")
        self._stop_asked.set()

    async def _drain(self) -> None:
        """Refuses new work and waits for what runs: not too long, nor after a second signal.

        Raises LaunchError when it cannot be finished.
        """
        timeout = self._config.graceful_termination_timeout
        self._drain_timeout = timeout
        self._run.write_status("draining", "the server is stopping")
        if timeout <= 0:
            return
        self._control.send("drain", timeout=timeout)  # or, to a router that is not there, later
        await _first([self._drained, self._stop_now, self._fatal], timeout)
        if self._fatal.done():
            self._fatal.result()  # raises why
        if not self._drained.is_set():
            self._output.warn("Stopping with requests unfinished")

    async def _tell_failure(self, message: str) -> None:
        """Lets waiting clients know before the end."""
        text = message if message.endswith((".", "!", "?")) else message + "."
        self._output.fatal(text)
        self._run.write_status("failed", text)
        if self._was_ready and self._control.send("failed", message=text):
            await _first([self._failure_told, self._stop_now], FAILED_SECONDS)

    async def _end(self) -> None:
        """Ends every child, in order, and removes every file."""
        keepers = list(self._tasks)
        for task in keepers:  # first of all: from now on nothing is started again
            task.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)
        try:
            front = [*self._gateways.values(), self._router]
            shards = [child for child in self._reaper.running if child not in front]
            if self._was_ready:
                await self._stop_front()
                await self._stop(shards)
            else:  # nothing runs on the shards that others would wait for
                await asyncio.gather(self._stop_front(), self._stop(shards))
        finally:
            for child in self._reaper.running:
                child.kill()
            if self._group is not None:
                self._group.remove_sockets()
            self._control.close()
            if self._listener is not None:
                self._listener.close()
            self._run.remove()

    async def _stop_front(self) -> None:
        await self._stop(list(self._gateways.values()))
        await self._stop([self._router] if self._router else [])

    async def _stop(self, children: list[Child]) -> None:
        """SIGTERM, patience, SIGKILL; SIGKILL at once after a second signal."""
        stops = asyncio.ensure_future(
            asyncio.gather(*(child.stop(STOP_SECONDS) for child in children))
        )
        await _first([stops, self._stop_now])
        if not stops.done():
            for child in children:
                child.kill()
        await stops


async def _first(
    things: Sequence[asyncio.Event | asyncio.Future[Any]], timeout: float | None = None
) -> None:
    """Waits until one of the events is set or one of the futures is done, not longer than that."""
    waits = [
        asyncio.ensure_future(
            thing.wait() if isinstance(thing, asyncio.Event) else asyncio.wait([thing])
        )
        for thing in things
    ]
    await asyncio.wait(waits, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
