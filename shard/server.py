"""The shard's gRPC service: converts messages, hands them to the model's thread. No policy."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from headgate.config_file import ConfigError
from headgate.proto import shard_pb2, shard_pb2_grpc
from headgate.proto.messages import StepPlan, StepResult, decode_plan, encode_result
from headgate.shard.model_thread import ModelThread
from headgate.shard.pending_step import PendingStep
from headgate.shard.runner import Runner
from headgate.shard.step_trace import StepTrace
from headgate.shard.vote import Superseded

SERVICE_NAME = shard_pb2.DESCRIPTOR.services_by_name["Shard"].full_name
MAX_MESSAGE_BYTES = 256 << 20
_WORKERS = 16  # of short calls; a Steps stream holds one


class StepStream:
    """One client's stream of plans. It is current until it ends or another one opens."""

    def __init__(self) -> None:
        self._results: queue.SimpleQueue[StepResult | None] = queue.SimpleQueue()
        self._closed = threading.Event()

    @property
    def is_current(self) -> bool:
        return not self._closed.is_set()

    def close(self) -> None:
        """No more plans are taken; results already there still go out if anybody listens."""
        self._closed.set()
        self._results.put(None)

    def put(self, result: StepResult) -> None:
        self._results.put(result)

    def results(self) -> Iterator[shard_pb2.StepResult]:
        while (result := self._results.get()) is not None:
            yield encode_result(result)  # here, beside the next step


@dataclass(frozen=True, slots=True)
class _Begun:
    """A step of some stream whose result has not gone out."""

    stream: StepStream
    plan: StepPlan
    step: PendingStep
    began: int


class ShardService(shard_pb2_grpc.ShardServicer):
    """headgate.shard.v1.Shard over one runner."""

    def __init__(
        self,
        runner: Runner,
        thread: ModelThread,
        trace: StepTrace | None = None,
        steps_path: str = "",
    ) -> None:
        """steps_path: of the socket that takes Steps too (step_socket.py); "": there is none."""
        self._runner = runner
        self._trace = trace
        self._steps_path = steps_path
        self._thread = thread
        self._lock = threading.Lock()
        self._stream: StepStream | None = None  # the current one
        self._begun: deque[_Begun] = deque()  # the model's thread's
        self._awaited: queue.SimpleQueue[_Begun] = queue.SimpleQueue()
        threading.Thread(target=self._await_steps, name="results", daemon=True).start()

    def Info(
        self, request: shard_pb2.InfoRequest, context: grpc.ServicerContext
    ) -> shard_pb2.InfoResponse:
        facts, config, identity = self._runner.facts, self._runner.config, self._runner.identity
        return shard_pb2.InfoResponse(
            epoch=identity.epoch,
            rank=identity.rank,
            world_size=identity.world_size,
            model_type=facts.model_type,
            dtype=config.dtype,
            device=config.device,
            vocab_size=facts.vocab_size,
            block_size=config.block_size,
            max_position_embeddings=facts.max_position_embeddings,
            kv_bytes_per_block=facts.kv_bytes_per_block,
            weight_bytes=facts.weight_bytes,
            eos_token_ids=facts.eos_token_ids,
            quantize=config.quantize,
            steps_path=self._steps_path,
        )

    def Warmup(
        self, request: shard_pb2.WarmupRequest, context: grpc.ServicerContext
    ) -> shard_pb2.WarmupResponse:
        max_tokens = request.max_batch_prefill_tokens
        largest = self._runner.config.max_batch_prefill_tokens
        if not 0 < max_tokens <= largest:
            context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"max_batch_prefill_tokens is {max_tokens}; it must be from 1 to {largest}",
            )
        num_blocks = self._thread.call(
            lambda: self._runner.warm_up(max_tokens, request.max_batch_size)
        )
        return shard_pb2.WarmupResponse(num_blocks=num_blocks)

    def Allocate(
        self, request: shard_pb2.AllocateRequest, context: grpc.ServicerContext
    ) -> shard_pb2.AllocateResponse:
        if not request.num_blocks:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "num_blocks is 0")
        self._thread.call(lambda: self._runner.allocate(request.num_blocks))
        return shard_pb2.AllocateResponse()

    def PrepareGrammar(
        self, request: shard_pb2.PrepareGrammarRequest, context: grpc.ServicerContext
    ) -> shard_pb2.PrepareGrammarResponse:
        self._runner.prepare_grammar(request.grammar)
        return shard_pb2.PrepareGrammarResponse()

    def Heartbeat(
        self, request: shard_pb2.HeartbeatRequest, context: grpc.ServicerContext
    ) -> shard_pb2.HeartbeatResponse:
        heartbeat = self._runner.heartbeat
        return shard_pb2.HeartbeatResponse(
            epoch=self._runner.identity.epoch, beats=heartbeat.beats, busy=heartbeat.busy
        )

    def Steps(
        self, request_iterator: Iterator[shard_pb2.StepPlans], context: grpc.ServicerContext
    ) -> Iterator[shard_pb2.StepResult]:
        stream = self.open_stream()
        if not context.add_callback(stream.close):
            stream.close()  # the client is gone already
        # Plans are read beside the model's thread: the next one is decoded while a step runs.
        threading.Thread(
            target=self.read_plans, args=(request_iterator, stream), name="plans", daemon=True
        ).start()
        yield from stream.results()

    def open_stream(self) -> StepStream:
        """A new current stream; it starts without rows."""
        stream = StepStream()
        with self._lock:
            if self._stream is not None:
                self._stream.close()
            self._stream = stream
            self._thread.post(self._runner.reset)
        return stream

    def read_plans(self, messages: Iterator[shard_pb2.StepPlans], stream: StepStream) -> None:
        """Returns when there are no more. The stream ends after the steps of those there were."""
        try:
            for message in messages:
                for each in message.plans:
                    plan, problem = _decode(each)
                    self._thread.post(partial(self._step, stream, plan, problem))
        except grpc.RpcError:  # the client broke the stream off
            stream.close()
        except Exception as error:  # the client would wait for ever for the plans not read
            self._thread.fail(error)
        self._thread.post(stream.close)

    # What follows is the model's thread's, but for `_await_steps`.

    def _step(self, stream: StepStream, plan: StepPlan, problem: str) -> None:
        if not stream.is_current:
            return
        began = time.perf_counter_ns()
        try:
            step = self._runner.begin(plan, lambda: stream.is_current, problem)
        except Superseded:
            return
        begun = _Begun(stream, plan, step, began)
        self._begun.append(begun)
        self._put_results()
        if not step.is_done:
            self._awaited.put(begun)

    def _await_steps(self) -> None:
        """Waits for the device, so that the model's thread need not: it begins the next step."""
        while True:
            begun = self._awaited.get()
            try:
                begun.step.wait()
            except Exception as error:
                self._thread.fail(error)
            self._thread.post(partial(self._end, begun))

    def _end(self, begun: _Begun) -> None:
        begun.step.result()
        self._put_results()

    def _put_results(self) -> None:
        """In the order of their plans."""
        while self._begun and self._begun[0].step.is_done:
            begun = self._begun.popleft()
            begun.stream.put(begun.step.result())
            if self._trace is not None:
                self._trace.note(begun.plan, begun.began, time.perf_counter_ns())


def _decode(message: shard_pb2.StepPlan) -> tuple[StepPlan, str]:
    """(plan, ""), or (an empty plan, why the message is none)."""
    try:
        return decode_plan(message), ""
    except (ValueError, OverflowError) as error:
        return StepPlan(message.epoch, message.sequence), f"the plan cannot be decoded: {error}"


def start_server(service: ShardService, address: str) -> grpc.Server:
    """Serves on `address`, with gRPC's health and reflection beside it; health says SERVING.

    Raises ConfigError when the address cannot be bound.
    """
    pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="grpc")
    server = grpc.server(
        pool,
        options=[
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ],
    )
    shard_pb2_grpc.add_ShardServicer_to_server(service, server)
    health_service = health.HealthServicer(
        experimental_non_blocking=True, experimental_thread_pool=pool
    )
    health_pb2_grpc.add_HealthServicer_to_server(health_service, server)
    reflection.enable_server_reflection(
        (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), server
    )
    names = ("", SERVICE_NAME)
    for name in names:
        health_service.set(name, health_pb2.HealthCheckResponse.NOT_SERVING)
    try:
        server.add_insecure_port(address)
    except RuntimeError as error:
        raise ConfigError(f"the shard cannot listen on {address}: {error}") from error
    server.start()
    for name in names:
        health_service.set(name, health_pb2.HealthCheckResponse.SERVING)
    return server
