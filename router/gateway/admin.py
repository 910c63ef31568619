"""Routes about the server and its requests: health, info, models, metrics, cancel."""

from __future__ import annotations

import orjson

from headgate.proto import router_pb2
from headgate.router.errors import NotFoundError, ValidationError
from headgate.router.gateway.errors import HealthcheckError, ModelNotFoundError
from headgate.router.gateway.exchange import JSON_HEADERS, MAX_REQUEST_ID, Exchange
from headgate.router.gateway.openai_common import served_name
from headgate.router.gateway.server_state import State
from headgate.router.gateway.services import Services
from headgate.router.gateway.tgi_schemas import CancelRequest

_METRICS_HEADERS = [(b"content-type", b"text/plain; version=0.0.4; charset=utf-8")]
# Router settings shown by /info beside the fields that TGI has.
_MORE_INFO = (
    "served_model_name", "dtype", "device", "quantize", "num_shards", "epoch", "block_size",
    "max_batch_prefill_tokens", "max_batch_total_tokens", "max_batch_size",
)  # fmt: skip


class AdminRoutes:
    """The routes over one set of services. Health never waits for anything."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def live(self, exchange: Exchange) -> None:
        await exchange.respond(b"", headers=[])

    async def ready(self, exchange: Exchange) -> None:
        """200 only while new requests are computed at once; the body tells the progress."""
        state, detail = self._services.state.current()
        if state is State.READY:
            await exchange.respond(b'{"state":"ready"}')
        else:
            await self._unhealthy(exchange, state, detail)

    async def health(self, exchange: Exchange) -> None:
        """200 from the first readiness on, a recovery included, until the server has failed."""
        state, detail = self._services.state.current()
        if state in (State.LOADING, State.FAILED):
            await self._unhealthy(exchange, state, detail)
        else:
            await exchange.respond(b"", headers=[])

    async def _unhealthy(self, exchange: Exchange, state: State, detail: str) -> None:
        error = HealthcheckError()
        body = {"error": error.message, "error_type": error.error_type}
        body |= {"state": state.value, "detail": detail}
        await exchange.respond(
            orjson.dumps(body),
            status=error.http_status,
            headers=[*JSON_HEADERS, (b"retry-after", b"2")],
        )

    async def info(self, exchange: Exchange) -> None:
        info = self._services.known_info()
        document = {
            "model_id": info.model_id,
            "model_sha": info.model_sha or None,
            "model_pipeline_tag": "text-generation",
            "max_concurrent_requests": info.max_concurrent_requests,
            "max_best_of": info.max_best_of,
            "max_stop_sequences": info.max_stop_sequences,
            "max_input_tokens": info.max_input_tokens,
            "max_total_tokens": info.max_total_tokens,
            "validation_workers": info.validation_workers,
            "max_client_batch_size": info.max_client_batch_size,
            "router": "headgate",
            "version": info.version,
            "sha": None,
            "docker_label": None,
            "max_top_n_tokens": info.max_top_n_tokens,
            "state": self._services.state.current()[0].value,
            **{name: getattr(info, name) for name in _MORE_INFO},
        }
        await exchange.respond(orjson.dumps(document))

    async def models(self, exchange: Exchange) -> None:
        models = [_model(self._services.known_info())]
        await exchange.respond(orjson.dumps({"object": "list", "data": models}))

    async def model(self, exchange: Exchange) -> None:
        info = self._services.known_info()
        name = exchange.path_params["model"]
        if not name or name not in (info.model_id, info.served_model_name):
            raise ModelNotFoundError(f"The model `{name}` does not exist", field="model")
        await exchange.respond(orjson.dumps(_model(info)))

    async def metrics(self, exchange: Exchange) -> None:
        """The router's registry: the same from every gateway."""
        await exchange.respond(await self._services.client.metrics(), headers=_METRICS_HEADERS)

    async def cancel(self, exchange: Exchange) -> None:
        """Ends running or waiting requests by the id in their `x-request-id`."""
        body = await exchange.read_json(CancelRequest, self._services.config.payload_limit)
        if not body.request_id:
            raise ValidationError("`request_id` cannot be empty", field="request_id")
        cancelled = await exchange.until(self._services.client.cancel_by_id(body.request_id))
        if not cancelled:
            shown = body.request_id[:MAX_REQUEST_ID]
            raise NotFoundError(f"No request `{shown}` is running or waiting", field="request_id")
        await exchange.respond(b'{"cancelled":%d}' % cancelled)


def _model(info: router_pb2.InfoResponse) -> dict[str, object]:
    name = served_name(info)
    return {"id": name, "object": "model", "created": 0, "owned_by": name}
