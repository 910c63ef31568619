"""POST /tokenize and /chat_tokenize: ids, texts and places of a prompt's tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import orjson

from headgate.proto import router_pb2
from headgate.router.gateway.exchange import Exchange
from headgate.router.gateway.openai_chat import ChatRoute
from headgate.router.gateway.openai_schemas import ChatRequest
from headgate.router.gateway.services import Services
from headgate.router.gateway.tgi_schemas import GenerateRequest


class TokenizeRoutes:
    """Both routes; the chat route's template is used for messages."""

    def __init__(self, services: Services, chat: ChatRoute) -> None:
        self._services = services
        self._chat = chat

    async def tokenize(self, exchange: Exchange) -> None:
        body = await exchange.read_json(GenerateRequest, self._services.config.payload_limit)
        spans = await exchange.until(self._services.client.tokenize(body.inputs))
        # A long text's answer has a million entries: too much for the event loop.
        await exchange.respond(await asyncio.to_thread(_document, spans))

    async def chat_tokenize(self, exchange: Exchange) -> None:
        body = await exchange.read_json(ChatRequest, self._services.config.payload_limit)
        text = await self._chat.prompt(body, self._services.serving_info())
        spans = await exchange.until(self._services.client.tokenize(text, add_special_tokens=False))
        tokens = await asyncio.to_thread(_document, spans)
        await exchange.respond(
            b'{"tokenize_response":%s,"templated_text":%s}' % (tokens, orjson.dumps(text))
        )


def _document(spans: Sequence[router_pb2.TokenSpan]) -> bytes:
    return orjson.dumps(
        [
            {"id": span.id, "text": span.text, "start": span.start, "stop": span.stop}
            for span in spans
        ]
    )
