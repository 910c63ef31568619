"""POST /v1/responses. Stateless: nothing is stored, so that nothing can be referred to later."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import orjson

from headgate.proto import router_pb2
from headgate.router.errors import RouterError, ValidationError
from headgate.router.gateway.chat_deltas import truncated
from headgate.router.gateway.exchange import JSON_HEADERS, Exchange
from headgate.router.gateway.generation import Answer, AnswerStream, collect, timing_headers
from headgate.router.gateway.grammar_fields import text_grammar
from headgate.router.gateway.openai_common import (
    FIELD_NAMES,
    check_model,
    served_name,
    to_parameters,
    token_logprobs,
    warn_of_hints,
)
from headgate.router.gateway.parsers.deltas import Parser, PlainParser, Reasoning
from headgate.router.gateway.responses_input import messages_of
from headgate.router.gateway.responses_output import Event, Logprobs, OutputItems, new_id
from headgate.router.gateway.responses_schemas import (
    ReasoningConfig,
    ResponsesRequest,
    TextConfig,
)
from headgate.router.gateway.served_chat import ServedChat, ServedChats
from headgate.router.gateway.services import Services
from headgate.router.gateway.token import Token
from headgate.router.gateway.tools import tools_of

_FIELD_NAMES = {
    **FIELD_NAMES,
    "inputs": "input",
    "messages": "input",
    "max_new_tokens": "max_output_tokens",
    "top_n_tokens": "top_logprobs",
    "grammar": "tools",
}
_UNSERVED = (
    "store", "previous_response_id", "conversation", "background", "prompt", "context_management",
    "moderation",
)  # fmt: skip
_LOGPROBS = "message.output_text.logprobs"  # in `include`


class ResponsesRoute:
    """The route."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._chats = ServedChats(services.config)

    async def __call__(self, exchange: Exchange) -> None:
        exchange.field_names = _FIELD_NAMES
        body = await exchange.read_json(ResponsesRequest, self._services.config.payload_limit)
        info = self._services.serving_info()
        check_model(body.model, info)
        if body.text and body.text.format:
            exchange.field_names = {**_FIELD_NAMES, "grammar": "text.format"}
        _refuse(body)
        use, top_n = tools_of(body, nested=False), _alternatives(body)
        chat = self._chats.of(info)
        _warn(exchange, body, chat)
        prompt = await chat.prompt(messages_of(body.input, body.instructions), use, _extra(body))
        grammar = chat.grammar(use, text_grammar(body.text.format if body.text else None))
        parameters = to_parameters(
            body, max_tokens=body.max_output_tokens, top_n=top_n, grammar=grammar
        )
        if chat.needs_special_tokens(use):
            parameters.skip_special_tokens = False
        request = router_pb2.GenerateRequest(
            text=prompt,
            add_special_tokens=False,
            parameters=parameters,
            request_id=exchange.request_id,
            adapter_id=body.adapter_id or "",
        )
        parser = chat.parser(use, prompt, grammar) or PlainParser()
        growing = _GrowingResponse(_constants(body, info), parser, top_n is not None)
        if body.stream:
            stream = _ResponseStream(self._services, exchange, growing)
            await stream.run([request], [growing])
            return
        (answer,) = await collect(self._services, exchange, [request])
        headers = timing_headers(self._services, exchange, [answer], compute_time=True)
        document = orjson.dumps(growing.whole(answer))
        await exchange.respond(document, headers=JSON_HEADERS + headers)


def _refuse(body: ResponsesRequest) -> None:
    for name in _UNSERVED:
        if getattr(body, name):
            raise ValidationError(f"`{name}` is not supported", field=name)
    if body.truncation not in (None, "disabled"):
        raise ValidationError(
            "`truncation` other than disabled is not supported", field="truncation"
        )


def _warn(exchange: Exchange, body: ResponsesRequest, chat: ServedChat) -> None:
    reasoning, text = body.reasoning or ReasoningConfig(), body.text or TextConfig()
    hints = {"reasoning.effort": reasoning.effort, "text.verbosity": text.verbosity}
    warn_of_hints(exchange, chat, hints, body.service_tier)
    exchange.warn_ignored("include", [name for name in body.include or () if name != _LOGPROBS])
    summaries = (reasoning.summary, reasoning.generate_summary)
    exchange.warn_ignored("reasoning.summary", [value for value in summaries if value])


def _alternatives(body: ResponsesRequest) -> int | None:
    """Alternatives for each token; None: no logprobs."""
    if _LOGPROBS in (body.include or ()):
        return body.top_logprobs or 0
    return body.top_logprobs or None


def _extra(body: ResponsesRequest) -> dict[str, Any]:
    """Variables for the chat template."""
    reasoning, text = body.reasoning or ReasoningConfig(), body.text or TextConfig()
    extra: dict[str, Any] = {"reasoning_effort": reasoning.effort, "verbosity": text.verbosity}
    extra = {name: value for name, value in extra.items() if value}
    return {**extra, **(body.chat_template_kwargs or {})}


def _constants(body: ResponsesRequest, info: router_pb2.InfoResponse) -> dict[str, Any]:
    """What a response says of its request; null where OpenAI says null."""
    return {
        "id": new_id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {},
        "model": served_name(info),
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
        "service_tier": "default",
        "store": False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": _echoed((body.text.format if body.text else None) or {"type": "text"})},
        "tool_choice": _echoed(body.tool_choice or "auto"),
        "tools": _echoed(body.tools or []),
        "top_logprobs": body.top_logprobs or 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
    }


def _echoed(value: Any) -> orjson.Fragment:
    """JSON of the client's own, as deep and with numbers as large as orjson does not write."""
    return orjson.Fragment(json.dumps(value, ensure_ascii=False).encode())


class _GrowingResponse:
    """One response: a Formatter of its events, and the document it ends as."""

    def __init__(self, constants: dict[str, Any], parser: Parser, logprobs: bool) -> None:
        self._constants = constants
        self._parser = parser
        self._logprobs = logprobs
        self._items = OutputItems()
        self._held: Logprobs = []  # of tokens whose text has not been shown
        self._sequence = 0
        self._tokens = 0
        self._reasoning_tokens = 0

    def begin(self) -> bytes:
        begun = dict(self._constants)
        return self._written(
            [{"type": f"response.{kind}", "response": begun} for kind in ("created", "in_progress")]
        )

    def token(self, token: Token, text: str) -> bytes:
        return self._written(self._take(token, text))

    def last(self, token: Token | None, text: str, finished: router_pb2.Finished) -> bytes:
        events = self._take(token, text)
        cut = truncated(finished)
        events += self._items.add(self._parser.finish(cut), self._take_held())
        return self._written(events + self._items.finish(cut))

    def end(self, finished: router_pb2.Finished) -> bytes:
        document = self._document(finished)
        return self._written([{"type": f"response.{document['status']}", "response": document}])

    def fail(self, error: RouterError) -> bytes:
        problem = {"code": "server_error", "message": error.message}
        document = {**self._constants, "status": "failed", "error": problem}
        document["output"] = self._items.items
        return self._written([{"type": "response.failed", "response": document}])

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The document of an answer that came as a whole."""
        rest = answer.finished.generated_text
        for token in answer.tokens:
            shown = token.text if rest.startswith(token.text) else ""
            self._take(token, shown)
            rest = rest[len(shown) :]
        self.last(None, rest, answer.finished)
        return self._document(answer.finished)

    def _take(self, token: Token | None, text: str) -> list[Event]:
        deltas = self._parser.feed(text)
        if token is not None:
            self._tokens += 1
            if any(isinstance(delta, Reasoning) for delta in deltas):
                self._reasoning_tokens = self._tokens
            if self._logprobs and not token.special:
                self._held.append(orjson.Fragment(token_logprobs(token)))
        return self._items.add(deltas, self._take_held()) if deltas else []

    def _take_held(self) -> Logprobs:
        held, self._held = self._held, []
        return held

    def _document(self, finished: router_pb2.Finished) -> dict[str, Any]:
        cut = truncated(finished)
        return {
            **self._constants,
            "status": "incomplete" if cut else "completed",
            "completed_at": None if cut else int(time.time()),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": self._items.items,
            "usage": {
                "input_tokens": finished.input_tokens,
                "input_tokens_details": {
                    "cached_tokens": finished.cached_tokens,
                    "cache_write_tokens": 0,  # a price of OpenAI's; nothing is charged for here
                },
                "output_tokens": finished.generated_tokens,
                "output_tokens_details": {"reasoning_tokens": self._reasoning_tokens},
                "total_tokens": finished.input_tokens + finished.generated_tokens,
            },
        }

    def _written(self, events: Sequence[Event]) -> bytes:
        data = []
        for event in events:
            numbered = {**event, "sequence_number": self._sequence}
            self._sequence += 1
            data.append(
                b"event: %s\ndata: %s\n\n" % (event["type"].encode(), orjson.dumps(numbered))
            )
        return b"".join(data)


class _ResponseStream(AnswerStream):
    """Begins with the response as it was asked for and ends with the response as it became."""

    def __init__(self, services: Services, exchange: Exchange, response: _GrowingResponse) -> None:
        super().__init__(services, exchange)
        self._response = response
        self.write(response.begin())  # goes out when the request has been accepted

    def tail(self, finished: Sequence[router_pb2.Finished]) -> bytes:
        return self._response.end(finished[0]) if finished else b""

    def error_event(self, error: RouterError) -> bytes:
        return self._response.fail(error)
