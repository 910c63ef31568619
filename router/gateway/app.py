"""The ASGI application: routes, request ids, CORS, the API key, and errors as typed JSON.

Every answer carries `x-request-id`; every refusal has a body with `error_type`. What a route
does is in its own module.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import uuid

from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route, Router
from starlette.types import Message, Receive, Scope, Send

from headgate.router.errors import (
    InternalError,
    MethodNotAllowedError,
    NotFoundError,
    RouterError,
    UnauthorizedError,
)
from headgate.router.gateway.admin import AdminRoutes
from headgate.router.gateway.by_keys import ByKeys, Handler
from headgate.router.gateway.config import GatewayConfig
from headgate.router.gateway.embeddings import EmbeddingsRoute
from headgate.router.gateway.errors import (
    ClientGoneError,
    openai_error,
    retry_after_header,
    tgi_error,
)
from headgate.router.gateway.exchange import JSON_HEADERS, MAX_REQUEST_ID, Exchange, Headers
from headgate.router.gateway.openai_chat import ChatRoute
from headgate.router.gateway.openai_completions import CompletionsRoute
from headgate.router.gateway.openapi import OpenApiRoutes
from headgate.router.gateway.responses import ResponsesRoute
from headgate.router.gateway.services import Services
from headgate.router.gateway.tgi import TgiRoutes
from headgate.router.gateway.tokenize import TokenizeRoutes
from headgate.router.gateway.vertex import VertexRoute
from headgate.router.gateway.vllm import VllmRoute

logger = logging.getLogger(__name__)

_COUNTED = (
    "/", "/generate", "/generate_stream", "/v1/chat/completions", "/v1/completions",
    "/v1/responses", "/v1/embeddings", "/invocations", "/vertex",
)  # fmt: skip
_EXPOSED_HEADERS = (
    "x-request-id", "x-headgate-warnings", "x-compute-type", "x-compute-time",
    "x-compute-characters", "x-total-time", "x-validation-time", "x-queue-time",
    "x-inference-time", "x-time-per-token", "x-prompt-tokens", "x-generated-tokens",
    "retry-after",
)  # fmt: skip


class Gateway:
    """The application of one gateway process."""

    def __init__(self, config: GatewayConfig) -> None:
        self.services = Services.of(config)
        self._config = config
        self._key_digest = _digest(config.api_key.encode())
        self.routes = self._make_routes()
        self._router = Router(list(self.routes), redirect_slashes=False)
        self._app = CORSMiddleware(
            self._dispatch,
            allow_origins=config.cors_allow_origin or ("*",),
            allow_methods=("GET", "POST"),
            allow_headers=("*",),  # credentials travel in `authorization`, never in cookies
            expose_headers=_EXPOSED_HEADERS,
        )

    def _make_routes(self) -> list[Route]:
        tgi, admin = TgiRoutes(self.services), AdminRoutes(self.services)
        chat, completions = ChatRoute(self.services), CompletionsRoute(self.services)
        tokenize = TokenizeRoutes(self.services, chat)
        openapi = OpenApiRoutes(self.services)
        limit = self._config.payload_limit
        inference: dict[str, Handler] = {
            "/generate": ByKeys(
                limit, {"inputs": tgi.generate, "prompt": VllmRoute(self.services)}
            ),
            "/generate_stream": tgi.generate_stream,
            "/v1/chat/completions": chat,
            "/v1/completions": completions,
            "/v1/responses": ResponsesRoute(self.services),
            "/v1/embeddings": EmbeddingsRoute(self.services),
            "/invocations": ByKeys(
                limit, {"inputs": tgi.root, "messages": chat, "prompt": completions}
            ),
            "/vertex": VertexRoute(self.services, chat),
            "/tokenize": tokenize.tokenize,
            "/chat_tokenize": tokenize.chat_tokenize,
            "/cancel": admin.cancel,
        }
        free: dict[str, Handler] = {
            "/health": admin.health,
            "/ping": admin.health,
            "/health/live": admin.live,
            "/health/ready": admin.ready,
            "/info": admin.info,
            "/metrics": admin.metrics,
            "/v1/models": admin.models,
            "/v1/models/{model:path}": admin.model,
            "/openapi.json": openapi.document,
            "/api-doc/openapi.json": openapi.document,
            "/docs": openapi.page,
        }
        # Vertex AI says where it sends its requests.
        if self._config.predict_route:
            inference.setdefault(self._config.predict_route, inference["/vertex"])
        if self._config.health_route:
            free.setdefault(self._config.health_route, admin.health)
        return [
            Route("/", _ByMethod(self, get=admin.health, post=tgi.root), methods=["GET", "POST"]),
            *(
                Route(path, _Endpoint(self, handler, protected=True), methods=["POST"])
                for path, handler in inference.items()
            ),
            *(
                Route(path, _Endpoint(self, handler, protected=False), methods=["GET"])
                for path, handler in free.items()
            ),
        ]

    # ------------------------------------------------------------------ ASGI

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        if scope["type"] != "http":
            return
        request_id = _request_id(scope)
        scope["headgate.request_id"] = request_id
        scope["app"] = self  # makes Starlette's router raise for 404 and 405
        header = (b"x-request-id", request_id.encode())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), header]
            await send(message)

        await self._app(scope, receive, send_with_id)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                self.start()
                await send({"type": "lifespan.startup.complete"})
            elif message["type"] == "lifespan.shutdown":
                await self.stop()
                await send({"type": "lifespan.shutdown.complete"})
                return

    def start(self) -> None:
        """Begins to look for the router. Needs a running event loop."""
        self.services.client.start()
        self.services.housekeeper.start()

    async def stop(self) -> None:
        self.services.housekeeper.stop()
        await self.services.client.stop()

    async def _dispatch(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._router(scope, receive, send)
        except HTTPException as error:
            exchange = Exchange(scope, receive, send, strict=self._config.strict)
            refusal: RouterError
            if error.status_code == 405:
                refusal = MethodNotAllowedError(
                    f"{exchange.method} is not a method of {exchange.path}"
                )
            else:
                refusal = NotFoundError(f"No route {exchange.path}")
            allow = (error.headers or {}).get("Allow", "")
            await self._refuse(exchange, refusal, [(b"allow", allow.encode())] if allow else [])

    async def serve(
        self, handler: Handler, protected: bool, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Runs one route, turning what it raises into an answer."""
        exchange = Exchange(scope, receive, send, strict=self._config.strict)
        try:
            if protected and self._config.api_key:
                self._check_key(exchange)
            await handler(exchange)
        except ClientGoneError:
            pass
        except RouterError as error:
            await self._refuse(exchange, error)
        except Exception:
            logger.exception(
                "a request failed", extra={"fields": {"request_id": exchange.request_id}}
            )
            await self._refuse(exchange, InternalError())
        finally:
            exchange.close()

    # -------------------------------------------------------------- refusals

    def _check_key(self, exchange: Exchange) -> None:
        scheme, _, key = exchange.header(b"authorization").partition(b" ")
        matches = hmac.compare_digest(_digest(key.strip()), self._key_digest)
        if scheme.lower() != b"bearer" or not matches:
            raise UnauthorizedError

    async def _refuse(
        self, exchange: Exchange, error: RouterError, extra_headers: Headers | None = None
    ) -> None:
        if not exchange.submitted:  # else the router has logged and counted it
            self._record(exchange, error)
        if exchange.response_started:
            return  # the connection is closed by the server, which shows that the answer is cut
        if exchange.path.startswith("/v1/"):
            body = openai_error(error, exchange.field_names)
        else:
            body = tgi_error(error, exchange.field_names)
        headers = JSON_HEADERS + retry_after_header(error) + (extra_headers or [])
        if error.http_status == 401:
            headers = [*headers, (b"www-authenticate", b"Bearer")]
        await exchange.respond(body, status=error.http_status, headers=headers)

    def _record(self, exchange: Exchange, error: RouterError) -> None:
        """One log line, and a count in the router's metrics where it was an inference request."""
        logger.info(
            "request refused",
            extra={
                "fields": {
                    "request_id": exchange.request_id,
                    "route": exchange.path,
                    "http_status": error.http_status,
                    "error_type": error.error_type,
                    "error": error.message,
                }
            },
        )
        counted = exchange.path in (*_COUNTED, self._config.predict_route)
        if counted and error.http_status not in (401, 405):
            self.services.client.count_failure(error.error_type)


class _Endpoint:
    """A route as Starlette takes it: an ASGI application."""

    def __init__(self, gateway: Gateway, handler: Handler, *, protected: bool) -> None:
        self._gateway = gateway
        self._handler = handler
        self._protected = protected

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._gateway.serve(self._handler, self._protected, scope, receive, send)


class _ByMethod:
    """The path / : a health check by GET, inference by POST."""

    def __init__(self, gateway: Gateway, *, get: Handler, post: Handler) -> None:
        self._get = _Endpoint(gateway, get, protected=False)
        self._post = _Endpoint(gateway, post, protected=True)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = self._post if scope["method"] == "POST" else self._get
        await endpoint(scope, receive, send)


def _digest(key: bytes) -> bytes:
    """Keys are compared by digest: in constant time whatever their lengths."""
    return hashlib.sha256(key).digest()


def _request_id(scope: Scope) -> str:
    """The client's `x-request-id` if it is short and printable, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and 0 < len(value) <= MAX_REQUEST_ID:
            text: str = value.decode("latin-1")
            if text.isascii() and text.isprintable():
                return text
    return uuid.uuid4().hex
