"""POST /v1/embeddings: the served model's hidden states of one or many inputs, pooled."""

from __future__ import annotations

import base64
import sys
from array import array
from collections.abc import Sequence
from typing import Any

import msgspec

from headgate.proto import router_pb2
from headgate.router.errors import ValidationError
from headgate.router.gateway.exchange import JSON_HEADERS, Exchange
from headgate.router.gateway.generation import Answer, collect, timing_headers
from headgate.router.gateway.openai_common import check_model, served_name
from headgate.router.gateway.openai_completions import Prompt, parse_prompts
from headgate.router.gateway.services import Services
from headgate.router.gateway.sse import json_string

MAX_INPUTS = 2048  # of one call, as OpenAI has it
_AT_ONCE = 32  # of them at the router, which takes a bounded number of requests from all clients
_FIELD_NAMES = {"inputs": "input", "max_new_tokens": "input", "truncate": "truncate_prompt_tokens"}


class EmbeddingsRequest(msgspec.Struct, kw_only=True):
    """Body of /v1/embeddings. `input`: a string, token ids, or a list of either."""

    input: Any
    model: str | None = None
    encoding_format: str | None = None
    dimensions: int | None = None
    user: str | None = None  # accepted, of no effect: nothing here is kept per user
    # vLLM's own:
    truncate_prompt_tokens: int | None = None
    add_special_tokens: bool | None = None


class EmbeddingsRoute:
    """The route."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def __call__(self, exchange: Exchange) -> None:
        exchange.field_names = _FIELD_NAMES
        body = await exchange.read_json(EmbeddingsRequest, self._services.config.payload_limit)
        info = self._services.serving_info()
        check_model(body.model, info)
        encoded = _is_base64(body)
        requests = _requests(body, info, exchange.request_id)
        answers: list[Answer] = []
        at_once = max(1, min(_AT_ONCE, info.max_concurrent_requests))
        for start in range(0, len(requests), at_once):
            part = requests[start : start + at_once]
            answers += await collect(self._services, exchange, part)
        headers = timing_headers(self._services, exchange, answers, compute_time=True)
        document = _document(served_name(info), answers, encoded)
        await exchange.respond(document, headers=JSON_HEADERS + headers)


def _is_base64(body: EmbeddingsRequest) -> bool:
    if body.encoding_format not in (None, "float", "base64"):
        raise ValidationError("`encoding_format` must be float or base64", field="encoding_format")
    if body.dimensions is not None:
        raise ValidationError(
            "`dimensions` is not supported: embeddings have the model's own size",
            field="dimensions",
        )
    return body.encoding_format == "base64"


def _requests(
    body: EmbeddingsRequest, info: router_pb2.InfoResponse, request_id: str
) -> list[router_pb2.GenerateRequest]:
    inputs = parse_prompts(body.input, MAX_INPUTS, field="input")
    parameters = router_pb2.Parameters(truncate=_truncate(body.truncate_prompt_tokens, info))
    requests = []
    for index, prompt in enumerate(inputs):
        request = router_pb2.GenerateRequest(
            parameters=parameters,
            embedding=router_pb2.Embedding(),
            add_special_tokens=body.add_special_tokens,
            request_id=request_id if len(inputs) == 1 else f"{request_id}-{index}",
            call_id=request_id,
        )
        _set_prompt(request, prompt)
        requests.append(request)
    return requests


def _set_prompt(request: router_pb2.GenerateRequest, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.token_ids.ids.extend(prompt)


def _truncate(value: int | None, info: router_pb2.InfoResponse) -> int | None:
    """Tokens to keep; -1 means as many as can be served."""
    if value == -1:
        return info.max_input_tokens
    if value is not None and not 0 < value <= info.max_input_tokens:
        raise ValidationError(
            f"`truncate_prompt_tokens` must be > 0 and <= {info.max_input_tokens}, or -1. "
            f"Given: {value}",
            field="truncate_prompt_tokens",
        )
    return value


def _document(model: str, answers: Sequence[Answer], encoded: bool) -> bytes:
    entries = (
        b'{"object":"embedding","index":%d,"embedding":%s}'
        % (index, _vector(answer.finished.embedding, encoded))
        for index, answer in enumerate(answers)
    )
    tokens = sum(answer.finished.input_tokens for answer in answers)
    return b'{"object":"list","data":[%s],"model":%s,"usage":{%s}}' % (
        b",".join(entries),
        json_string(model),
        b'"prompt_tokens":%d,"total_tokens":%d' % (tokens, tokens),
    )


def _vector(values: Sequence[float], encoded: bool) -> bytes:
    """A JSON list of float32s, or their little-endian bytes as a JSON string of base64."""
    if not encoded:
        return b"[%s]" % b",".join(b"%.9g" % value for value in values)
    packed = array("f", values)
    if sys.byteorder == "big":
        packed.byteswap()
    return b'"%s"' % base64.b64encode(packed.tobytes())
