"""Puts a router together: tokenizer, engine, service, its servers. Follows no launcher."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from headgate.proto import router_pb2_grpc
from headgate.proto.framing import MAX_MESSAGE_BYTES, stream_path
from headgate.router.auth import ApiKeyInterceptor
from headgate.router.config import RouterConfig
from headgate.router.engine import Engine
from headgate.router.gateway_socket import GatewaySocket
from headgate.router.intake import Intake
from headgate.router.metrics import Metrics
from headgate.router.multiplex import MultiplexStream, Streams
from headgate.router.output_processor import OutputProcessor
from headgate.router.service import SERVICE_NAME, RouterService
from headgate.router.status import FAILED, READY, ServerStatus
from headgate.router.tokenizer import ChatFiles, Tokenizer
from headgate.router.validation import Validator


class AddressInUse(Exception):
    """An address cannot be listened on. One sentence for the user."""


@dataclass(frozen=True, slots=True)
class Parts:
    """A router without its server: what the group keeper and tests need."""

    config: RouterConfig
    status: ServerStatus
    tokenizer: Tokenizer
    outputs: OutputProcessor
    metrics: Metrics
    validator: Validator
    engine: Engine
    service: RouterService
    streams: Streams

    @classmethod
    def build(cls, config: RouterConfig, tokenizer: Tokenizer, chat: ChatFiles) -> Parts:
        status = ServerStatus(config, chat)
        outputs = OutputProcessor(tokenizer.pieces)
        metrics = Metrics(config.max_input_tokens, config.max_total_tokens)
        validator = Validator(config, tokenizer)
        engine = Engine(config, status, outputs, metrics)
        intake = Intake(engine, validator, metrics)
        streams = Streams(lambda: MultiplexStream(engine, intake, status))
        service = RouterService(engine, intake, status, tokenizer, metrics, streams)
        return cls(config, status, tokenizer, outputs, metrics, validator, engine, service, streams)


class RouterServer:
    """The gRPC server, with health and reflection, and the socket for gateways.

    Health follows the server's state.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        interceptors = []
        if parts.config.api_key:
            interceptors.append(ApiKeyInterceptor(parts.config.api_key))
        self._server = grpc.aio.server(
            interceptors=interceptors,
            options=[
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ],
        )
        self._health = health.aio.HealthServicer()
        self._gateways = GatewaySocket(parts.streams, parts.config.api_key)
        self.port = 0  # of the TCP address, once started

    async def start(self) -> None:
        """Raises AddressInUse."""
        config, server = self._parts.config, self._server
        router_pb2_grpc.add_RouterServicer_to_server(self._parts.service, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        self._listen(config.gateway_address)
        if config.grpc_host:
            host = f"[{config.grpc_host}]" if ":" in config.grpc_host else config.grpc_host
            self.port = self._listen(f"{host}:{config.grpc_port}")
        await self._tell_health()
        await server.start()
        path = stream_path(config.gateway_address)
        try:
            await self._gateways.start(path)
        except OSError as error:
            raise AddressInUse(f"the router cannot listen on {path}") from error

    async def follow_status(self) -> None:
        """Keeps health in step with the state; runs until cancelled."""
        changed = asyncio.Event()
        unsubscribe = self._parts.status.subscribe(changed.set)
        try:
            while True:
                changed.clear()
                await self._tell_health()
                await changed.wait()
        finally:
            unsubscribe()

    async def stop(self, grace: float) -> None:
        """Open calls get `grace` seconds to end."""
        await self._server.stop(grace)
        self._gateways.stop()

    def _listen(self, address: str) -> int:
        try:
            return self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise AddressInUse(f"the router cannot listen on {address}") from error

    async def _tell_health(self) -> None:
        """The empty name mirrors /health (a recovery leaves it alone), the other /health/ready."""
        status = self._parts.status
        alive = status.was_ready and status.state != FAILED
        for name, serving in (("", alive), (SERVICE_NAME, status.state == READY)):
            state = health_pb2.HealthCheckResponse
            await self._health.set(name, state.SERVING if serving else state.NOT_SERVING)
