"""POST /v1/completions: one or several prompts, as texts or token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from headgate.proto import router_pb2
from headgate.router.errors import ValidationError
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
    logprob_of,
    names_given,
    prompt_logprobs,
    to_parameters,
    usage,
)
from headgate.router.gateway.openai_schemas import CompletionRequest
from headgate.router.gateway.services import Services
from headgate.router.gateway.sse import json_string
from headgate.router.gateway.tgi_schemas import MAX_UINT32
from headgate.router.gateway.token import Token

_FIELD_NAMES = {**FIELD_NAMES, "inputs": "prompt", "top_n_tokens": "logprobs"}

Prompt = str | list[int]


class CompletionsRoute:
    """The route."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def __call__(self, exchange: Exchange) -> None:
        exchange.field_names = _FIELD_NAMES
        config = self._services.config
        body = await exchange.read_json(CompletionRequest, config.payload_limit)
        exchange.field_names = names_given(_FIELD_NAMES, body)
        info = self._services.serving_info()
        check_model(body.model, info)
        if body.suffix:
            raise ValidationError("`suffix` is not supported", field="suffix")
        prompts = parse_prompts(body.prompt, config.max_client_batch_size)
        top_n = alternatives(body.logprobs, body.top_n)
        requests = _requests(body, prompts, top_n, exchange.request_id)
        for request in requests:
            add_choices(request.parameters, body, info)
        reply = Reply.of(info, "cmpl")
        if body.stream:
            await self._stream(exchange, body, requests, reply, top_n)
            return
        answers = await collect(self._services, exchange, requests)
        of_choices = [prompt for prompt in prompts for _ in range(body.n or 1)]
        choices = [
            _choice(index, prompt, answer, body, logprobs=top_n is not None)
            for index, (prompt, answer) in enumerate(zip(of_choices, answers, strict=True))
        ]
        document = _document(reply, choices, answers)
        headers = timing_headers(self._services, exchange, answers, compute_time=False)
        await exchange.respond(document, headers=JSON_HEADERS + headers)

    async def _stream(
        self,
        exchange: Exchange,
        body: CompletionRequest,
        requests: Sequence[router_pb2.GenerateRequest],
        reply: Reply,
        top_n: int | None,
    ) -> None:
        texts = [request.text for request in requests for _ in range(num_answers(request))]
        if body.echo and (top_n is not None or not all(texts)):
            raise ValidationError(
                "`echo` with `logprobs` or token ids is not supported when streaming", field="echo"
            )
        options = body.stream_options
        events = [
            _Chunks(
                reply,
                index,
                echo=text if body.echo else "",
                logprobs=top_n is not None,
                own_usage=options is None,
            )
            for index, text in enumerate(texts)
        ]
        wanted = options is not None and options.include_usage
        usage_event = usage_event_of(reply) if wanted else None
        await OpenAIStream(self._services, exchange, usage_event).run(requests, events)


def parse_prompts(value: Any, limit: int, field: str = "prompt") -> list[Prompt]:
    """The prompts of a body's `prompt` or other `field`. Raises ValidationError."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise ValidationError(
            f"`{field}` must be a string, a list of strings, or token ids", field=field
        )
    if _is_ids(value):
        return [value]
    if len(value) > limit:
        raise ValidationError(
            f"`{field}` holds {len(value)} prompts, more than the allowed batch of {limit}",
            field=field,
        )
    for index, entry in enumerate(value):
        if not isinstance(entry, str) and not (isinstance(entry, list) and _is_ids(entry)):
            where = f"{field}[{index}]"
            raise ValidationError(f"`{where}` must be a string or token ids", field=where)
    return value


def _is_ids(value: list[Any]) -> bool:
    return all(type(entry) is int and 0 <= entry <= MAX_UINT32 for entry in value)


def _requests(
    body: CompletionRequest, prompts: Sequence[Prompt], top_n: int | None, request_id: str
) -> list[router_pb2.GenerateRequest]:
    requests = []
    grammar = grammar_of(body)
    for index, prompt in enumerate(prompts):
        # Only the router can say an id's text, and it does so with the prompt's logprobs.
        wants_prefill = bool(body.echo) and (
            top_n is not None or not isinstance(prompt, str) or body.max_tokens == 0
        )
        parameters = to_parameters(
            body,
            max_tokens=body.max_tokens,
            top_n=top_n,
            grammar=grammar,
            prompt_logprobs=wants_prefill,
        )
        request = router_pb2.GenerateRequest(
            parameters=parameters,
            add_special_tokens=body.add_special_tokens,
            request_id=request_id if len(prompts) == 1 else f"{request_id}-{index}",
            call_id=request_id if len(prompts) > 1 else "",
            adapter_id=body.adapter_id or "",
        )
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.token_ids.ids.extend(prompt)
        requests.append(request)
    return requests


# ------------------------------------------------------------------- shapes


def _document(reply: Reply, choices: Sequence[bytes], answers: Sequence[Answer]) -> bytes:
    return (
        b'{"object":"text_completion","id":%s,"created":%s,"model":%s,"system_fingerprint":%s,'
        b'"choices":[%s],"usage":%s}'
    ) % (
        reply.id,
        reply.created,
        reply.model,
        reply.fingerprint,
        b",".join(choices),
        usage(answer.finished for answer in answers),
    )


def _choice(
    index: int, prompt: Prompt, answer: Answer, body: CompletionRequest, *, logprobs: bool
) -> bytes:
    finished = answer.finished
    text, tokens = finished.generated_text, list(answer.tokens)
    if body.echo:
        prefill = answer.prefill
        shown = prompt if isinstance(prompt, str) else "".join(token.text for token in prefill)
        text, tokens = shown + text, [*prefill, *tokens]
    return b'{"index":%d,"text":%s,"logprobs":%s,"finish_reason":%s%s}' % (
        index,
        json_string(text),
        _logprobs(tokens, 0) if logprobs else b"null",
        finish_reason(finished),
        prompt_logprobs(answer.prefill, body.prompt_logprobs),
    )


def _logprobs(tokens: Sequence[Token], offset: int) -> bytes:
    """OpenAI's four lists side by side. `offset`: characters before the first token."""
    offsets = []
    for token in tokens:
        offsets.append(b"%d" % offset)
        offset += len(token.text)
    return b'{"tokens":[%s],"token_logprobs":[%s],"top_logprobs":[%s],"text_offset":[%s]}' % (
        b",".join(json_string(token.text) for token in tokens),
        b",".join(map(logprob_of, tokens)),
        b",".join(map(_top_logprobs, tokens)),
        b",".join(offsets),
    )


def _top_logprobs(token: Token) -> bytes:
    """Text to logprob, best first, with the token itself; null where it has no logprob."""
    if token.logprob is None:
        return b"null"
    pairs: dict[str, bytes] = {}
    for other in token.top:
        pairs.setdefault(other.text, logprob_of(other))  # parts of characters share a text
    if all(other.id != token.id for other in token.top):
        pairs.setdefault(token.text, logprob_of(token))
    return b"{%s}" % b",".join(json_string(text) + b":" + value for text, value in pairs.items())


def usage_event_of(reply: Reply) -> tuple[bytes, bytes]:
    before = b'data: {"object":"text_completion","id":%s,"created":%s,"choices":[],%s,"usage":' % (
        reply.id,
        reply.created,
        _names(reply),
    )
    return before, b"}\n\n"


def _names(reply: Reply) -> bytes:
    return b'"model":%s,"system_fingerprint":%s' % (reply.model, reply.fingerprint)


class _Chunks:
    """text_completion events of one prompt; the constant parts are made once."""

    def __init__(
        self, reply: Reply, index: int, *, echo: str, logprobs: bool, own_usage: bool
    ) -> None:
        """`own_usage`: the last event carries this prompt's usage, as TGI does it."""
        self._logprobs = logprobs
        self._own_usage = own_usage
        self._echo = echo
        self._offset = len(echo)
        self._before = (
            b'data: {"object":"text_completion","id":%s,"created":%s,"choices":[{"index":%d,"text":'
        ) % (reply.id, reply.created, index)
        self._names = b"}]," + _names(reply)
        null_usage = b"" if own_usage else b',"usage":null'
        self._after = b',"finish_reason":null' + self._names + null_usage + b"}\n\n"

    def token(self, token: Token, text: str) -> bytes:
        return self._start(token, text) + self._after

    def last(self, token: Token | None, text: str, finished: router_pb2.Finished) -> bytes:
        counts = usage((finished,)) if self._own_usage else b"null"
        end = b',"finish_reason":%s%s,"usage":%s}\n\n' % (
            finish_reason(finished),
            self._names,
            counts,
        )
        return self._start(token, text) + end

    def _start(self, token: Token | None, text: str) -> bytes:
        if self._echo:
            text, self._echo = self._echo + text, ""
        start = self._before + json_string(text) + b',"logprobs":'
        if not self._logprobs or token is None:
            return start + b"null"
        offset, self._offset = self._offset, self._offset + len(token.text)
        return start + _logprobs((token,), offset)
