"""POST /generate as vLLM's demonstration server answers it: texts that include the prompt.

The fields are those of vLLM's SamplingParams, with its defaults and rules. Streams are JSON
objects of the whole text so far, each followed by a newline, or by NUL as in vLLM's first years.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any, ClassVar

from headgate.proto import router_pb2
from headgate.router.errors import RouterError, ValidationError
from headgate.router.gateway.errors import tgi_error
from headgate.router.gateway.exchange import JSON_HEADERS, Exchange, Headers
from headgate.router.gateway.generation import (
    AnswerStream,
    check_num_answers,
    collect,
    num_answers,
    timing_headers,
)
from headgate.router.gateway.openai_common import FIELD_NAMES
from headgate.router.gateway.services import Services
from headgate.router.gateway.sse import json_string
from headgate.router.gateway.token import Token
from headgate.router.gateway.vllm_schemas import VllmGenerateRequest
from headgate.sampling_params import SamplingParams

_FIELD_NAMES = {
    **FIELD_NAMES,
    "inputs": "prompt",
    "truncate": "truncate_prompt_tokens",
    "grammar": "structured_outputs",
}
_NOT_SAMPLING = ("prompt", "stream")
_WITHOUT_PLACE = ("logprobs", "prompt_logprobs")  # in the answer, vLLM's as ours


class VllmRoute:
    """The route."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._stream = NulStream if services.config.vllm_stream_nul else LineStream

    async def __call__(self, exchange: Exchange) -> None:
        exchange.field_names = _FIELD_NAMES
        body = await exchange.read_json(VllmGenerateRequest, self._services.config.payload_limit)
        request = router_pb2.GenerateRequest(
            text=body.prompt,
            parameters=_parameters(body, exchange.warnings),
            request_id=exchange.request_id,
        )
        n = num_answers(request)
        check_num_answers(n, self._services.serving_info())
        if body.stream:
            stream = self._stream(self._services, exchange)
            texts = [json_string(body.prompt)[:-1]] * n  # their closing quotes come with the rest
            await stream.run([request], [_Texts(texts, i, stream.delimiter) for i in range(n)])
            return
        answers = await collect(self._services, exchange, [request])
        texts = [json_string(body.prompt + answer.finished.generated_text) for answer in answers]
        document = b'{"text":[%s]}' % b",".join(texts)
        headers = timing_headers(self._services, exchange, answers, compute_time=True)
        await exchange.respond(document, headers=JSON_HEADERS + headers)


def _parameters(body: VllmGenerateRequest, notes: list[str]) -> router_pb2.Parameters:
    """The router's parameters; what vLLM would warn of is added to `notes`.

    Raises ValidationError for a value out of range, or one that is not served.
    """
    given: dict[str, Any] = {
        name: value
        for name in body.__struct_fields__
        if name not in _NOT_SAMPLING
        and ((value := getattr(body, name)) is not None or name == "max_tokens")
    }
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            params = SamplingParams(**given)
    except ValueError as error:  # its text begins with the field in backquotes
        raise ValidationError(str(error), field=str(error).split("`")[1]) from None
    notes.extend(str(warning.message) for warning in caught)
    for name in _WITHOUT_PLACE:
        if getattr(params, name) is not None:
            notes.append(f"`{name}` has no effect: the answer holds texts only")
    return replace(params, logprobs=None, prompt_logprobs=None).to_router().to_proto()


class LineStream(AnswerStream):
    """One JSON object a line."""

    delimiter: ClassVar[bytes] = b"\n"
    media_headers: ClassVar[Headers] = [
        (b"content-type", b"application/x-ndjson"),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),
    ]
    keep_alive: ClassVar[bytes] = b"\n"  # clients of either kind skip empty pieces

    def error_event(self, error: RouterError) -> bytes:
        return tgi_error(error, self._exchange.field_names) + self.delimiter


class NulStream(LineStream):
    """As the clients of 2023 split it."""

    delimiter: ClassVar[bytes] = b"\0"
    media_headers: ClassVar[Headers] = [
        (b"content-type", b"application/octet-stream"),
        *LineStream.media_headers[1:],
    ]
    keep_alive: ClassVar[bytes] = b"\0"


class _Texts:
    """Objects with the whole texts so far of all answers, one for each token of this one."""

    def __init__(self, texts: list[bytes], index: int, delimiter: bytes) -> None:
        """`texts`: of all answers, as JSON but for the closing quote; `index`: this one's."""
        self._texts = texts
        self._index = index
        self._delimiter = delimiter

    def token(self, token: Token, text: str) -> bytes:
        self._texts[self._index] += json_string(text)[1:-1]
        return b'{"text":[%s"]}%s' % (b'",'.join(self._texts), self._delimiter)

    def last(self, token: Token | None, text: str, finished: router_pb2.Finished) -> bytes:
        return self.token(Token(0, "", None), text)
