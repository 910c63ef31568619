"""POST /vertex: Google Vertex AI's shape, several requests of /generate or of chat in one body."""

from __future__ import annotations

from typing import Any

import orjson

from headgate.proto import router_pb2
from headgate.router.errors import ValidationError
from headgate.router.gateway.chat_deltas import message_of, truncated
from headgate.router.gateway.exchange import JSON_HEADERS, Exchange
from headgate.router.gateway.generation import collect, timing_headers
from headgate.router.gateway.openai_chat import CHAT_FIELD_NAMES, ChatCall, ChatRoute
from headgate.router.gateway.openai_common import names_given
from headgate.router.gateway.openai_schemas import ChatRequest
from headgate.router.gateway.parsers.deltas import ParsedAnswer, Parser
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
        calls = [
            await self._call(exchange, instance, index, info)
            for index, instance in enumerate(body.instances)
        ]
        if not all(map(_is_chat, body.instances)):
            exchange.field_names = {}  # whose request the router refuses is not known here
        answers = await collect(self._services, exchange, [call.request for call in calls])
        best = (answer.finished for answer in answers if answer.finished.index == 0)
        predictions = [
            _prediction(finished, call.parsers[0])
            for finished, call in zip(best, calls, strict=True)
        ]
        headers = timing_headers(self._services, exchange, answers, compute_time=True)
        await exchange.respond(
            b'{"predictions":[%s]}' % b",".join(predictions), headers=JSON_HEADERS + headers
        )

    async def _call(
        self,
        exchange: Exchange,
        instance: dict[str, Any],
        index: int,
        info: router_pb2.InfoResponse,
    ) -> ChatCall:
        where, name = f"instances[{index}]", f"{exchange.request_id}-{index}"
        if _is_chat(instance):
            exchange.field_names = CHAT_FIELD_NAMES
            chat = exchange.convert(instance, ChatRequest, where)
            exchange.field_names = names_given(CHAT_FIELD_NAMES, chat)
            call = await self._chat.prepare(chat, info, name)
        else:
            exchange.field_names = {}
            generate = exchange.convert(instance, GenerateRequest, where)
            call = ChatCall(to_request(generate, name), [None])
        call.request.call_id = exchange.request_id
        return call


def _is_chat(instance: dict[str, Any]) -> bool:
    return instance.get("messages") is not None


def _prediction(finished: router_pb2.Finished, parser: Parser | None) -> bytes:
    """The answer's text; the chat route's `message` where there is more than content to it."""
    if parser is None:
        return json_string(finished.generated_text)
    answer = ParsedAnswer.of(parser, finished.generated_text, truncated(finished))
    if answer.calls or answer.reasoning:
        return orjson.dumps(message_of(answer))
    return json_string(answer.content)
