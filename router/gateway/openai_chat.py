"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headgate.proto import router_pb2
from headgate.router.errors import ValidationError
from headgate.router.gateway.chat_deltas import ParsedDeltas, parsed_message
from headgate.router.gateway.chat_messages import flatten
from headgate.router.gateway.exchange import JSON_HEADERS, Exchange
from headgate.router.gateway.generation import Answer, collect, num_answers, timing_headers
from headgate.router.gateway.grammar_fields import grammar_of
from headgate.router.gateway.openai_common import (
    FIELD_NAMES,
    OpenAIStream,
    Reply,
    add_choices,
    alternatives,
    check_model,
    finish_reason,
    names_given,
    prompt_logprobs,
    to_parameters,
    token_logprobs,
    usage,
    warn_of_hints,
)
from headgate.router.gateway.openai_schemas import ChatRequest
from headgate.router.gateway.parsers.deltas import Parser
from headgate.router.gateway.served_chat import ServedChat, ServedChats
from headgate.router.gateway.services import Services
from headgate.router.gateway.sse import json_string
from headgate.router.gateway.token import Token
from headgate.router.gateway.tools import ToolUse, tools_of

CHAT_FIELD_NAMES = {
    **FIELD_NAMES,
    "inputs": "messages",
    "top_n_tokens": "top_logprobs",
    "grammar": "tools",
}
_UNSERVED = ("audio", "store", "web_search_options", "moderation")


@dataclass(frozen=True, slots=True)
class ChatCall:
    """A chat as the router's request, and what reads its answers."""

    request: router_pb2.GenerateRequest
    parsers: Sequence[Parser | None]  # one for each answer; None: it is plain text


class ChatRoute:
    """The route; /vertex and /chat_tokenize prepare chats with it too."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._chats = ServedChats(services.config)

    async def __call__(self, exchange: Exchange) -> None:
        exchange.field_names = CHAT_FIELD_NAMES
        body = await exchange.read_json(ChatRequest, self._services.config.payload_limit)
        exchange.field_names = names_given(CHAT_FIELD_NAMES, body)
        info = self._services.serving_info()
        hints = {"reasoning_effort": body.reasoning_effort, "verbosity": body.verbosity}
        warn_of_hints(exchange, self._chats.of(info), hints, body.service_tier)
        if body.prediction:
            exchange.warn_ignored("prediction", ["it would make nothing faster"])
        call = await self.prepare(body, info, exchange.request_id)
        top_n = _alternatives(body)
        reply = Reply.of(info, "chatcmpl")
        if body.stream:
            events = [
                _Chunks(reply, index, logprobs=top_n is not None)
                for index in range(len(call.parsers))
            ]
            formatters = [
                one if parser is None else one.parsed(parser)
                for one, parser in zip(events, call.parsers, strict=True)
            ]
            wanted = body.stream_options is not None and body.stream_options.include_usage
            usage_event = events[0].usage_event() if wanted else None
            stream = OpenAIStream(self._services, exchange, usage_event)
            await stream.run([call.request], formatters)
            return
        answers = await collect(self._services, exchange, [call.request])
        headers = timing_headers(self._services, exchange, answers, compute_time=True)
        await exchange.respond(
            _document(reply, answers, call.parsers, body, logprobs=top_n is not None),
            headers=JSON_HEADERS + headers,
        )

    async def prepare(
        self, body: ChatRequest, info: router_pb2.InfoResponse, request_id: str
    ) -> ChatCall:
        """Raises ModelNotFoundError, ValidationError, TemplateError."""
        check_model(body.model, info)
        _refuse(body)
        chat, use = self._chats.of(info), tools_of(body, nested=True)
        parameters = to_parameters(
            body,
            max_tokens=_max_tokens(body),
            top_n=_alternatives(body),
            grammar=chat.grammar(use, grammar_of(body)),
        )
        add_choices(parameters, body, info)
        prompt = await self._prompt(chat, body, use)
        if chat.needs_special_tokens(use):
            parameters.skip_special_tokens = False
        request = router_pb2.GenerateRequest(
            text=prompt,
            add_special_tokens=False,
            parameters=parameters,
            request_id=request_id,
            adapter_id=body.adapter_id or "",
        )
        grammar = parameters.grammar if parameters.HasField("grammar") else None
        parsers = [chat.parser(use, prompt, grammar) for _ in range(num_answers(request))]
        return ChatCall(request, parsers)

    async def prompt(self, body: ChatRequest, info: router_pb2.InfoResponse) -> str:
        """The chat as the template writes it. Raises ValidationError, TemplateError."""
        return await self._prompt(self._chats.of(info), body, tools_of(body, nested=True))

    async def _prompt(self, chat: ServedChat, body: ChatRequest, use: ToolUse) -> str:
        messages = flatten(body.messages)
        extra = {"reasoning_effort": body.reasoning_effort, "verbosity": body.verbosity}
        extra = {name: value for name, value in extra.items() if value}
        extra.update(body.chat_template_kwargs or {})
        return await chat.prompt(messages, use, extra, body.tool_prompt)


def _refuse(body: ChatRequest) -> None:
    if body.functions:
        raise ValidationError("`functions` is not supported", field="functions")
    if body.function_call not in (None, "none", "auto"):
        raise ValidationError("`function_call` is not supported", field="function_call")
    for name in _UNSERVED:
        if getattr(body, name):
            raise ValidationError(f"`{name}` is not supported", field=name)
    if any(modality != "text" for modality in body.modalities or ()):
        raise ValidationError("`modalities` other than text is not supported", field="modalities")


def _alternatives(body: ChatRequest) -> int | None:
    if body.top_logprobs and not body.logprobs:
        raise ValidationError("`top_logprobs` needs `logprobs` to be true", field="top_logprobs")
    return alternatives((body.top_logprobs or 0) if body.logprobs else None, body.top_n)


def _max_tokens(body: ChatRequest) -> int | None:
    if body.max_tokens is None or body.max_completion_tokens is None:
        return body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if body.max_tokens != body.max_completion_tokens:
        raise ValidationError(
            "`max_tokens` and `max_completion_tokens` differ", field="max_completion_tokens"
        )
    return body.max_tokens


# ------------------------------------------------------------------- shapes


def _document(
    reply: Reply,
    answers: Sequence[Answer],
    parsers: Sequence[Parser | None],
    body: ChatRequest,
    *,
    logprobs: bool,
) -> bytes:
    choices = [
        _choice(index, answer, parser, logprobs=logprobs)
        for index, (answer, parser) in enumerate(zip(answers, parsers, strict=True))
    ]
    return (
        b'{"object":"chat.completion","id":%s,"created":%s,"model":%s,"system_fingerprint":%s,'
        b'"choices":[%s],"usage":%s%s}'
    ) % (
        reply.id,
        reply.created,
        reply.model,
        reply.fingerprint,
        b",".join(choices),
        usage(answer.finished for answer in answers),
        prompt_logprobs(answers[0].prefill, body.prompt_logprobs),
    )


def _choice(index: int, answer: Answer, parser: Parser | None, *, logprobs: bool) -> bytes:
    if parser is None:
        text = json_string(answer.finished.generated_text)
        message, reason = (
            b'{"role":"assistant","content":%s}' % text,
            finish_reason(answer.finished),
        )
    else:
        message, reason = parsed_message(parser, answer.finished)
    return b'{"index":%d,"message":%s,"logprobs":%s,"finish_reason":%s}' % (
        index,
        message,
        _logprobs(answer.tokens) if logprobs else b"null",
        reason,
    )


def _logprobs(tokens: Sequence[Token]) -> bytes:
    return b'{"content":[%s]}' % b",".join(map(token_logprobs, tokens))


class _Chunks:
    """chat.completion.chunk events of one choice; the constant parts are made once."""

    def __init__(self, reply: Reply, index: int, *, logprobs: bool) -> None:
        self._index = index
        self._logprobs = logprobs
        self._head = (
            b'data: {"object":"chat.completion.chunk","id":%s,"created":%s,"model":%s,'
            b'"system_fingerprint":%s,"choices":['
        ) % (reply.id, reply.created, reply.model, reply.fingerprint)
        self._before = self._head + (b'{"index":%d,"delta":{"role":"assistant","content":' % index)
        self._after = b',"finish_reason":null}],"usage":null}\n\n'

    def parsed(self, parser: Parser) -> ParsedDeltas:
        """The same stream for an answer that is parsed."""
        before = self._head + b'{"index":%d,"delta":' % self._index
        return ParsedDeltas(parser, before, _logprobs if self._logprobs else None)

    def usage_event(self) -> tuple[bytes, bytes]:
        return self._head + b'],"usage":', b"}\n\n"

    def token(self, token: Token, text: str) -> bytes:
        return self._before + json_string(text) + self._middle(token) + self._after

    def last(self, token: Token | None, text: str, finished: router_pb2.Finished) -> bytes:
        reason = finish_reason(finished)
        after = b',"finish_reason":%s}],"usage":null}\n\n' % reason
        return self._before + json_string(text) + self._middle(token) + after

    def _middle(self, token: Token | None) -> bytes:
        if not self._logprobs or token is None:
            return b'},"logprobs":null'
        return b'},"logprobs":' + _logprobs((token,))
