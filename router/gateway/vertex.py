"""POST /vertex: Google Vertex AI's shape, several requests of /generate or of chat in one body."""

from __future__ import annotations

from typing import Any

from headgate.proto import router_pb2
from headgate.router.errors import ValidationError
from headgate.router.gateway.exchange import JSON_HEADERS, Exchange
from headgate.router.gateway.generation import collect, timing_headers
from headgate.router.gateway.openai_chat import ChatRoute
from headgate.router.gateway.openai_schemas import ChatRequest
from headgate.router.gateway.services import Services
from headgate.router.gateway.sse import json_string
from headgate.router.gateway.tgi import to_request
from headgate.router.gateway.tgi_schemas import GenerateRequest, VertexRequest


class VertexRoute:
    """The route; `chat` makes requests of messages."""

    def __init__(self, services: Services, chat: ChatRoute) -> None:
        self._services = services
        self._chat = chat

    async def __call__(self, exchange: Exchange) -> None:
        body = await exchange.read_json(VertexRequest, self._services.config.payload_limit)
        info = self._services.serving_info()
        most = info.max_concurrent_requests
        if not 0 < len(body.instances) <= most:
            raise ValidationError(
                f"`instances` must hold 1 to {most} entries. Given: {len(body.instances)}",
                field="instances",
            )
        requests = [
            await self._request(exchange, instance, index, info)
            for index, instance in enumerate(body.instances)
        ]
        answers = await collect(self._services, exchange, requests)
        best = (answer.finished for answer in answers if answer.finished.index == 0)
        texts = [json_string(finished.generated_text) for finished in best]
        headers = timing_headers(self._services, exchange, answers, compute_time=True)
        await exchange.respond(
            b'{"predictions":[%s]}' % b",".join(texts), headers=JSON_HEADERS + headers
        )

    async def _request(
        self,
        exchange: Exchange,
        instance: dict[str, Any],
        index: int,
        info: router_pb2.InfoResponse,
    ) -> router_pb2.GenerateRequest:
        where, name = f"instances[{index}]", f"{exchange.request_id}-{index}"
        if instance.get("messages") is not None:
            chat = exchange.convert(instance, ChatRequest, where)
            request = (await self._chat.prepare(chat, info, name)).request
        else:
            request = to_request(exchange.convert(instance, GenerateRequest, where), name)
        request.call_id = exchange.request_id
        return request
