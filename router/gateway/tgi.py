"""TGI's own routes: /generate, /generate_stream and /, whose `stream` chooses between them."""

from __future__ import annotations

from collections.abc import Sequence

from headgate.proto import router_pb2
from headgate.router.errors import RouterError, ValidationError
from headgate.router.gateway.errors import tgi_error
from headgate.router.gateway.exchange import JSON_HEADERS, Exchange
from headgate.router.gateway.generation import Answer, AnswerStream, collect, timing_headers
from headgate.router.gateway.grammar_fields import tgi_grammar
from headgate.router.gateway.services import Services
from headgate.router.gateway.sse import event, json_number, json_string
from headgate.router.gateway.tgi_schemas import (
    MAX_UINT32,
    MAX_UINT64,
    GenerateParameters,
    GenerateRequest,
)
from headgate.router.gateway.token import Token

FINISH_REASONS = {
    router_pb2.FINISH_REASON_LENGTH: b"length",
    router_pb2.FINISH_REASON_EOS_TOKEN: b"eos_token",
    router_pb2.FINISH_REASON_STOP_SEQUENCE: b"stop_sequence",
}
_SAME_NAME = (
    "temperature", "repetition_penalty", "frequency_penalty", "presence_penalty", "top_k",
    "top_p", "typical_p", "min_p", "max_new_tokens", "min_new_tokens", "stop", "stop_token_ids",
    "truncate", "seed", "top_n_tokens",
    "watermark",
)  # fmt: skip


class TgiRoutes:
    """The three routes over one set of services."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def generate(self, exchange: Exchange) -> None:
        body = await exchange.read_json(GenerateRequest, self._services.config.payload_limit)
        await self._respond(exchange, body, full_text=False, as_list=False)

    async def generate_stream(self, exchange: Exchange) -> None:
        body = await exchange.read_json(GenerateRequest, self._services.config.payload_limit)
        await self._stream(exchange, body, full_text=False)

    async def root(self, exchange: Exchange) -> None:
        """/ answers as the Hub's text-generation pipeline does: a list, prompt included."""
        body = await exchange.read_json(GenerateRequest, self._services.config.payload_limit)
        if body.stream:
            await self._stream(exchange, body, full_text=True)
        else:
            await self._respond(exchange, body, full_text=True, as_list=True)

    async def _respond(
        self, exchange: Exchange, body: GenerateRequest, *, full_text: bool, as_list: bool
    ) -> None:
        parameters = body.parameters or GenerateParameters()
        request = to_request(body, exchange.request_id)
        answers = await collect(self._services, exchange, [request])
        prompt = body.inputs if _wants_full_text(parameters, full_text) else ""
        details = parameters.details or parameters.decoder_input_details
        document = _document(answers, prompt, details=bool(details))
        headers = timing_headers(self._services, exchange, answers, compute_time=True)
        await exchange.respond(
            b"[" + document + b"]" if as_list else document, headers=JSON_HEADERS + headers
        )

    async def _stream(self, exchange: Exchange, body: GenerateRequest, *, full_text: bool) -> None:
        parameters = body.parameters or GenerateParameters()
        if parameters.best_of not in (None, 1):
            raise ValidationError(
                "`best_of` != 1 is not supported when streaming tokens", field="best_of"
            )
        if parameters.decoder_input_details:
            raise ValidationError(
                "`decoder_input_details` == true is not supported when streaming tokens",
                field="decoder_input_details",
            )
        request = to_request(body, exchange.request_id)
        prompt = body.inputs if _wants_full_text(parameters, full_text) else ""
        events = _Events(prompt, details=bool(parameters.details))
        await _TgiStream(self._services, exchange).run([request], [events])


def to_request(body: GenerateRequest, request_id: str) -> router_pb2.GenerateRequest:
    """The router's request. Raises ValidationError for what is not served or cannot be said."""
    given = body.parameters
    # TGI samples where `parameters` is left out altogether, and is greedy where it is empty.
    do_sample = True if given is None else given.do_sample
    given = given or GenerateParameters()
    if given.top_k is not None and not 0 < given.top_k <= MAX_UINT32:
        raise ValidationError("`top_k` must be strictly positive", field="top_k")
    if given.seed is not None and given.seed > MAX_UINT64:
        raise ValidationError(f"`seed` must be <= {MAX_UINT64}", field="seed")
    if given.max_new_tokens == 0:  # which the router takes beside prompt logprobs
        raise ValidationError("`max_new_tokens` must be strictly positive", field="max_new_tokens")
    wish = bool(given.decoder_input_details)
    best_of = given.best_of if (given.best_of or 0) > 1 else None
    if best_of and given.seed is not None:
        raise ValidationError("`seed` must not be set when `best_of` > 1", field="seed")
    parameters = router_pb2.Parameters(
        **{name: getattr(given, name) for name in _SAME_NAME},
        do_sample=do_sample,
        ignore_eos=given.ignore_eos_token,
        prompt_logprobs=wish or None,
        grammar=tgi_grammar(given.grammar),
        n=best_of,  # all of them are shown, the best first
        best_of=best_of,
    )
    return router_pb2.GenerateRequest(
        text=body.inputs,
        parameters=parameters,
        request_id=request_id,
        adapter_id=given.adapter_id or "",
    )


def _wants_full_text(parameters: GenerateParameters, default: bool) -> bool:
    asked = parameters.return_full_text
    return default if asked is None else asked


# ------------------------------------------------------------------- shapes


def _document(answers: Sequence[Answer], prompt: str, *, details: bool) -> bytes:
    """The first answer; others, from `best_of`, are shown in its details."""
    best, *others = answers
    text = json_string(prompt + best.finished.generated_text)
    if not details:
        return b'{"generated_text":%s}' % text
    sequences = b""
    if others:
        sequences = b',"best_of_sequences":[%s]' % b",".join(
            b'{"generated_text":%s,%s}'
            % (json_string(prompt + other.finished.generated_text), _details(other))
            for other in others
        )
    return b'{"generated_text":%s,"details":{%s%s}}' % (text, _details(best), sequences)


def _details(answer: Answer) -> bytes:
    """The members of an answer's details."""
    finished, tokens = answer.finished, answer.tokens
    top = b""
    if any(token.top for token in tokens):
        top = b',"top_tokens":[%s]' % b",".join(_token_list(token.top) for token in tokens)
    return b'"finish_reason":"%s","generated_tokens":%d,"seed":%s,"prefill":[%s],"tokens":%s%s' % (
        FINISH_REASONS.get(finished.reason, b"length"),
        finished.generated_tokens,
        _seed(finished),
        b",".join(map(_prefill_token, answer.prefill)),
        _answer_tokens(tokens, finished),
        top,
    )


def _seed(finished: router_pb2.Finished) -> bytes:
    return b"%d" % finished.seed if finished.HasField("seed") else b"null"


def _logprob(token: Token) -> bytes:
    return json_number(token.logprob) if token.logprob is not None else b"null"


def _token(token: Token, text: str | None = None) -> bytes:
    """`text`: what to show as the token's text, where it is not the whole."""
    return b'{"id":%d,"text":%s,"logprob":%s,"special":%s}' % (
        token.id,
        json_string(token.text if text is None else text),
        _logprob(token),
        b"true" if token.special else b"false",
    )


def _prefill_token(token: Token) -> bytes:
    return b'{"id":%d,"text":%s,"logprob":%s}' % (
        token.id,
        json_string(token.text),
        _logprob(token),
    )


def _token_list(tokens: Sequence[Token]) -> bytes:
    return b"[%s]" % b",".join(map(_token, tokens))


def _answer_tokens(tokens: Sequence[Token], finished: router_pb2.Finished) -> bytes:
    shown = [_token(token) for token in tokens]
    if tokens:
        before = sum(map(_visible_length, tokens[:-1]))
        shown[-1] = _token(tokens[-1], _last_text(tokens[-1], before, finished))
    return b"[%s]" % b",".join(shown)


def _visible_length(token: Token) -> int:
    return 0 if token.special else len(token.text)


def _last_text(token: Token, before: int, finished: router_pb2.Finished) -> str:
    """The last token's text, cut where a stop text ended inside it.

    With that the texts of an answer's tokens are its text, as where tokens and stop texts end
    together. `before`: characters of the tokens before it.
    """
    if finished.reason != router_pb2.FINISH_REASON_STOP_SEQUENCE or token.special:
        return token.text
    return token.text[: max(len(finished.generated_text) - before, 0)]


# ------------------------------------------------------------------ streams


class _TgiStream(AnswerStream):
    def error_event(self, error: RouterError) -> bytes:
        return event(tgi_error(error, self._exchange.field_names))


class _Events:
    """Events of one answer: one per token, the last with the whole text."""

    def __init__(self, prompt: str, *, details: bool) -> None:
        self._prompt = prompt
        self._details = details
        self._index = 0
        self._length = 0  # characters of the tokens so far

    def token(self, token: Token, text: str) -> bytes:
        self._length += _visible_length(token)
        return self._event(token, token.text, b"null", b"null")

    def last(self, token: Token | None, text: str, finished: router_pb2.Finished) -> bytes:
        details = b"null"
        if self._details:
            details = (
                b'{"finish_reason":"%s","generated_tokens":%d,"seed":%s,"input_length":%d}'
                % (
                    FINISH_REASONS.get(finished.reason, b"length"),
                    finished.generated_tokens,
                    _seed(finished),
                    finished.input_tokens,
                )
            )
        whole = json_string(self._prompt + finished.generated_text)
        if token is None:  # sent already: TGI's shape has no end without a token
            self._index -= 1
            token = Token(0, "", 0.0, special=True)
        shown = _last_text(token, self._length, finished)
        return self._event(token, shown, whole, details)

    def _event(self, token: Token, text: str, whole: bytes, details: bytes) -> bytes:
        self._index += 1
        top = b',"top_tokens":' + _token_list(token.top) if token.top else b""
        return b'data: {"index":%d,"token":%s%s,"generated_text":%s,"details":%s}\n\n' % (
            self._index,
            _token(token, text),
            top,
            whole,
            details,
        )
