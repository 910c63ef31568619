"""The shard's gRPC service and its socket over a fake model; the shard as a process over a tiny
real one."""

from __future__ import annotations

import errno
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from headgate.config_file import ConfigError
from headgate.proto import shard_pb2, shard_pb2_grpc
from headgate.proto.framing import frame, stream_path, wait_for_message
from headgate.proto.messages import NewRow, RowSampling, StepPlan, decode_result, encode_plan
from headgate.shard.config import ShardIdentity
from headgate.shard.distributed import single_group
from headgate.shard.model_runner import ModelRunner
from headgate.shard.model_thread import ModelThread
from headgate.shard.server import SERVICE_NAME, ShardService, start_server
from headgate.shard.step_socket import StepSocket
from tests.unit.fake_model import EOS, VOCAB, FakeModel, greedy, shard_config

PROMPT = [3, 14, 15]


class Shard:
    """A served fake model and a client, whose streams are of a kind."""

    def __init__(self, directory: Path, streams: str) -> None:
        self.model = FakeModel()
        self.errors: list[BaseException] = []
        runner = ModelRunner(self.model, single_group(), shard_config(), ShardIdentity(0, 1, 7))  # type: ignore[arg-type]
        self.address = f"unix:{directory}/shard.sock"
        self.steps_path = stream_path(self.address)
        service = ShardService(
            runner, ModelThread(1, self.errors.append), steps_path=self.steps_path
        )
        self.socket = StepSocket(service, self.steps_path)
        self.server = start_server(service, self.address)
        self.channel = grpc.insecure_channel(self.address)
        self.stub = shard_pb2_grpc.ShardStub(self.channel)
        self._streams = streams

    def allocate(self) -> None:
        self.stub.Allocate(shard_pb2.AllocateRequest(num_blocks=40))

    def open(self) -> Stream:
        return Stream(self.stub) if self._streams == "gRPC" else SocketStream(self.steps_path)

    def close(self) -> None:
        self.channel.close()
        self.socket.close()
        self.server.stop(None).wait()


class Stream:
    """A Steps stream, spoken by hand."""

    def __init__(self, stub: shard_pb2_grpc.ShardStub) -> None:
        self._plans: queue.SimpleQueue[shard_pb2.StepPlans | None] = queue.SimpleQueue()
        call = stub.Steps(iter(self._plans.get, None))
        self.cancel: Callable[[], object] = call.cancel
        self.results: Iterator[shard_pb2.StepResult] = call

    def send(self, *plans: StepPlan) -> None:
        """In one message."""
        self.send_raw(*map(encode_plan, plans))

    def send_raw(self, *messages: shard_pb2.StepPlan) -> None:
        self._plans.put(shard_pb2.StepPlans(plans=messages))

    def finish(self) -> None:
        self._plans.put(None)

    def receive(self) -> tuple[int, list[int], list[int], str]:
        """(sequence, rows, tokens, refusal)"""
        result = decode_result(next(self.results))
        return result.sequence, list(result.rows), list(result.token_ids), result.refused


class SocketStream(Stream):
    """The same over the socket."""

    def __init__(self, path: str) -> None:
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.settimeout(30)
        self.connection.connect(path)
        self._file = self.connection.makefile("rb")
        self.results = iter(self._next, None)  # type: ignore[arg-type]
        self.cancel = self._close

    def send_raw(self, *messages: shard_pb2.StepPlan) -> None:
        self.connection.sendall(frame(shard_pb2.StepPlans(plans=messages)))

    def finish(self) -> None:
        self.connection.shutdown(socket.SHUT_WR)

    def _next(self) -> shard_pb2.StepResult | None:
        return wait_for_message(self._file, shard_pb2.StepResult())

    def _close(self) -> None:
        self._file.close()
        self.connection.close()


def first_plan(row_id: int = 1, sequence: int = 1) -> StepPlan:
    row = NewRow(row_id, PROMPT, RowSampling(20), block_ids=range(8))
    return StepPlan(7, sequence, new_rows=[row], rows=[row_id], counts=[3])


@pytest.fixture(params=["gRPC", "socket"])
def shard(
    tmp_path: Path, reference_kernels: None, request: pytest.FixtureRequest
) -> Iterator[Shard]:
    shard = Shard(tmp_path, request.param)
    yield shard
    shard.close()
    assert not shard.errors


# ------------------------------------------------------------------ the service


def test_info_tells_who_the_shard_is(shard: Shard) -> None:
    info = shard.stub.Info(shard_pb2.InfoRequest())
    assert (info.epoch, info.rank, info.world_size) == (7, 0, 1)
    assert (info.vocab_size, info.block_size, list(info.eos_token_ids)) == (VOCAB, 4, [EOS])
    assert info.kv_bytes_per_block == 2 * 4 * 4
    assert info.steps_path == shard.steps_path


def test_warm_up_and_allocate(shard: Shard) -> None:
    request = shard_pb2.WarmupRequest(max_batch_prefill_tokens=64, max_batch_size=8)
    assert shard.stub.Warmup(request).num_blocks == 40
    assert shard.model.batches == [32, 8]  # a CPU's
    shard.allocate()


@pytest.mark.parametrize("tokens", [0, 65])
def test_a_warm_up_beyond_the_configuration_is_refused(shard: Shard, tokens: int) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        shard.stub.Warmup(shard_pb2.WarmupRequest(max_batch_prefill_tokens=tokens))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_plans_in_flight(shard: Shard) -> None:
    shard.allocate()
    stream = shard.open()
    stream.send(first_plan())
    stream.send(StepPlan(7, 2, rows=[1], counts=[1]), StepPlan(7, 3, rows=[1], counts=[1]))
    tokens = greedy(PROMPT, 3)
    assert stream.receive() == (1, [1], tokens[:1], "")
    assert stream.receive() == (2, [1], tokens[1:2], "")
    assert stream.receive() == (3, [1], tokens[2:3], "")
    stream.finish()
    assert list(stream.results) == []


def test_results_of_plans_sent_before_the_end_still_come(shard: Shard) -> None:
    shard.allocate()
    stream = shard.open()
    stream.send(first_plan())
    stream.finish()
    assert stream.receive()[:2] == (1, [1])
    assert list(stream.results) == []


def test_a_new_stream_drops_the_rows_of_the_old_one(shard: Shard) -> None:
    shard.allocate()
    old = shard.open()
    old.send(first_plan())
    old.receive()
    new = shard.open()
    new.send(first_plan(sequence=1))  # the same row id again: it would be refused as known
    assert new.receive() == (1, [1], greedy(PROMPT, 1), "")
    assert list(old.results) == []  # ended by the shard


def test_a_plan_that_cannot_be_decoded_is_refused(shard: Shard) -> None:
    shard.allocate()
    stream = shard.open()
    stream.send_raw(shard_pb2.StepPlan(epoch=7, sequence=1, rows=b"abc"))
    assert "cannot be decoded" in stream.receive()[3]
    stream.send(StepPlan(7, 2, rows=[1], counts=[1]))
    assert "resync needed" in stream.receive()[3]
    stream.send(StepPlan(7, 3, reset=True))
    assert stream.receive() == (3, [], [], "")


def test_a_failure_to_read_plans_ends_the_shard(
    shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(message: shard_pb2.StepPlan) -> StepPlan:
        raise AttributeError("a bug")

    monkeypatch.setattr("headgate.shard.server.decode_plan", broken)
    shard.allocate()
    stream = shard.open()
    stream.send(first_plan())
    deadline = time.monotonic() + 10
    while not shard.errors:
        assert time.monotonic() < deadline, "the plan is waited for for ever"
        time.sleep(0.01)
    assert str(shard.errors.pop()) == "a bug"


def test_heartbeat_and_health_answer_while_a_step_hangs(shard: Shard) -> None:
    shard.allocate()
    heartbeat, gate, entered = shard.model.heartbeat, threading.Event(), threading.Event()

    def hang() -> None:
        heartbeat()
        entered.set()
        gate.wait(30)

    shard.model.heartbeat = hang
    stream = shard.open()
    stream.send(first_plan())
    assert entered.wait(30)
    request = shard_pb2.HeartbeatRequest()
    beats = [shard.stub.Heartbeat(request, timeout=5) for _ in range(2)]
    health = health_pb2_grpc.HealthStub(shard.channel)
    status = health.Check(health_pb2.HealthCheckRequest(service=SERVICE_NAME), timeout=5).status
    gate.set()
    assert status == health_pb2.HealthCheckResponse.SERVING
    assert [(beat.epoch, beat.busy) for beat in beats] == [(7, True)] * 2
    assert beats[0].beats == beats[1].beats == 1
    assert stream.receive()[0] == 1
    after = shard.stub.Heartbeat(request)
    assert after.beats > 1 and not after.busy


def test_a_client_that_goes_away_leaves_the_shard_usable(shard: Shard) -> None:
    shard.allocate()
    for _ in range(20):  # more than there are worker threads
        stream = shard.open()
        stream.send(first_plan())
        stream.receive()
        stream.cancel()
    stream = shard.open()
    stream.send(first_plan())
    assert stream.receive()[1] == [1]


def test_reflection_names_the_service(shard: Shard) -> None:
    database = ProtoReflectionDescriptorDatabase(shard.channel)
    services = {"headgate.shard.v1.Shard", "grpc.health.v1.Health"}
    assert services <= set(database.get_services())
    assert database.FindFileContainingSymbol(SERVICE_NAME).package == "headgate.shard.v1"


def test_an_address_that_cannot_be_bound_is_a_configuration_error(shard: Shard) -> None:
    service = ShardService(None, None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="cannot listen on"):
        start_server(service, f"unix:/nowhere/{'x' * 200}")


def test_what_is_no_message_ends_a_sockets_stream(tmp_path: Path, reference_kernels: None) -> None:
    shard = Shard(tmp_path, "socket")
    stream = shard.open()
    assert isinstance(stream, SocketStream)
    stream.connection.sendall(b"\xff" * 8)
    assert list(stream.results) == []
    shard.allocate()
    stream = shard.open()  # the next one is served
    stream.send(first_plan())
    assert stream.receive()[1] == [1]
    shard.close()
    assert not shard.errors


def test_a_connection_that_cannot_be_taken_is_tried_again(
    tmp_path: Path,
    reference_kernels: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    accept, failures = socket.socket.accept, [OSError(errno.EMFILE, "Too many open files")]

    def accept_later(listener: socket.socket) -> tuple[socket.socket, object]:
        if listener.family == socket.AF_UNIX and failures:
            raise failures.pop()
        return accept(listener)

    monkeypatch.setattr(socket.socket, "accept", accept_later)
    shard = Shard(tmp_path, "socket")
    shard.allocate()
    stream = shard.open()
    stream.send(first_plan())
    assert stream.receive()[1] == [1]
    assert not failures and "Too many open files" in caplog.text
    shard.close()
    assert not shard.errors


def test_a_socket_left_behind_is_taken_over_and_one_out_of_reach_told(tmp_path: Path) -> None:
    service = ShardService(None, None)  # type: ignore[arg-type]
    path = str(tmp_path / "shard.stream")
    for _ in range(2):
        StepSocket(service, path).close()
        assert os.path.exists(path)
    with pytest.raises(ConfigError, match="cannot listen on /nowhere/"):
        StepSocket(service, "/nowhere/shard.stream")


# ------------------------------------------------------------------ the process


class Process:
    """`python -m headgate.shard` in a group of `world_size`."""

    def __init__(self, directory: Path, rank: int = 0, world_size: int = 1, port: int = 0) -> None:
        self._errors = open(directory / f"stderr-{rank}", "w+")  # noqa: SIM115
        self.socket = directory / f"shard-1-{rank}.sock"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "headgate.shard", "--config", str(directory / "shard.json")],
            env={
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "HEADGATE_EPOCH": "1",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            },
            stderr=self._errors,
        )

    def wait(self, timeout: float) -> int:
        return self.process.wait(timeout)

    def log(self) -> list[dict[str, str]]:
        self._errors.seek(0)
        return [json.loads(line) for line in self._errors if line.startswith("{")]

    def stub(self) -> shard_pb2_grpc.ShardStub:
        channel = grpc.insecure_channel(f"unix:{self.socket}")
        deadline = time.monotonic() + 60
        while not self.socket.exists():
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return shard_pb2_grpc.ShardStub(channel)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._errors.close()


def write_config(directory: Path, world_size: int = 1, **fields: object) -> None:
    config = {
        "model_path": "",
        "dtype": "float32",
        "device": "cpu",
        "kernels": "reference",
        "num_threads": 1,
        "max_batch_prefill_tokens": 32,
        "max_batch_size": 4,
        "max_total_tokens": 64,
        "num_blocks": 16,
        "addresses": [f"unix:{directory}/shard-{{epoch}}-{r}.sock" for r in range(world_size)],
    }
    (directory / "shard.json").write_text(json.dumps({**config, **fields}))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_processes_serve_and_notice_a_death(tmp_path: Path, tiny_llama: Path) -> None:
    write_config(tmp_path, 2, model_path=str(tiny_llama))
    port = free_port()
    shards = [Process(tmp_path, rank, 2, port) for rank in range(2)]
    try:
        stubs = [shard.stub() for shard in shards]
        calls = [
            stub.Warmup.future(shard_pb2.WarmupRequest(max_batch_prefill_tokens=32))
            for stub in stubs
        ]
        assert [call.result(60).num_blocks for call in calls] == [16, 16]
        for stub in stubs:
            stub.Allocate(shard_pb2.AllocateRequest(num_blocks=16), timeout=60)
        infos = [stub.Info(shard_pb2.InfoRequest(), timeout=60) for stub in stubs]
        streams = [SocketStream(info.steps_path) for info in infos]
        row = NewRow(1, list(b"hello"), RowSampling(8, ignore_eos=True), block_ids=[2])
        for stream in streams:
            stream.send(StepPlan(1, 1, new_rows=[row], rows=[1], counts=[5]))
        results = [stream.receive() for stream in streams]
        assert results[0][:2] == (1, [1]) and results[1] == (1, [], [], "")
        shards[1].kill()
        streams[0].send(StepPlan(1, 2, rows=[1], counts=[1]))
        assert shards[0].wait(10) == 1
        assert "lost shard 1" in shards[0].log()[-1]["message"]
        assert not shards[0].socket.exists()
        assert not os.path.exists(infos[0].steps_path)
    finally:
        for shard in shards:
            shard.kill()


def test_sigterm_ends_a_shard_quietly(tmp_path: Path, tiny_llama: Path) -> None:
    write_config(tmp_path, model_path=str(tiny_llama))
    shard = Process(tmp_path)
    try:
        shard.stub().Info(shard_pb2.InfoRequest(), timeout=30)
        shard.process.send_signal(signal.SIGTERM)
        assert shard.wait(10) == 0
        assert not shard.socket.exists()
        assert {line["level"] for line in shard.log()} == {"info"}
    finally:
        shard.kill()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_path": "/no"}, "/no has no config.json, so it is not a model checkpoint"),
        ({"dtype": "int3"}, "dtype is 'int3'; it must be one of float32, bfloat16, float16"),
    ],
)
def test_what_cannot_be_served_is_one_sentence(
    tmp_path: Path, fields: dict[str, str], message: str
) -> None:
    write_config(tmp_path, **fields)
    shard = Process(tmp_path)
    try:
        assert shard.wait(60) == 2
        last = shard.log()[-1]
        assert (last["level"], last["process"], last["message"]) == ("error", "shard-0", message)
        assert [line["level"] for line in shard.log()].count("error") == 1
    finally:
        shard.kill()
