"""Asks every gRPC call for the API key, but those that monitoring needs."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from headgate.router.errors import UnauthorizedError

OPEN_PREFIXES = ("/grpc.health.v1.", "/grpc.reflection.", "/headgate.router.v1.Router/Metrics")


def is_authorized(header: str | bytes | None, api_key: str) -> bool:
    """Whether `Bearer KEY` holds the key; takes as long for a wrong one as for the right one."""
    given = header.encode() if isinstance(header, str) else header or b""
    scheme, _, key = given.partition(b" ")
    right = hmac.compare_digest(key.strip(), api_key.encode())
    return right and scheme.lower() == b"bearer"


class ApiKeyInterceptor(grpc.aio.ServerInterceptor):
    """Metadata `authorization: Bearer KEY`; UNAUTHENTICATED otherwise."""

    def __init__(self, api_key: str) -> None:
        self._api_key = api_key

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith(OPEN_PREFIXES):
            return handler
        metadata = dict(handler_call_details.invocation_metadata)
        if is_authorized(metadata.get("authorization"), self._api_key):
            return handler
        return _refusal(handler)


def _refusal(handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
    """A handler of the same kind that refuses."""
    error = UnauthorizedError()

    async def unary(request: Any, context: grpc.aio.ServicerContext) -> None:
        await context.abort(error.grpc_code, error.message, trailing_metadata=error.metadata())

    async def stream(request: Any, context: grpc.aio.ServicerContext) -> Any:
        await unary(request, context)
        yield  # makes it a generator, as a streaming handler has to be

    if handler.request_streaming and handler.response_streaming:
        return grpc.stream_stream_rpc_method_handler(stream)
    if handler.request_streaming:
        return grpc.stream_unary_rpc_method_handler(unary)
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(stream)
    return grpc.unary_unary_rpc_method_handler(unary)
