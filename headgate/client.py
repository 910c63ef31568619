"""A client for the router's gRPC interface: text in, text out.

    from headgate import Client

    with Client("localhost:3001") as client:
        print(client.generate("The capital of Japan is", max_new_tokens=10).text)
        for piece in client.stream("Once upon a time", temperature=0.8, seed=1):
            print(piece.text, end="")

A thin layer over the generated stubs of router.proto (`headgate.proto.router_pb2_grpc`), which can
be used by themselves. Every failed call raises a `headgate.router.errors.RouterError`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import grpc

from headgate.proto import router_pb2, router_pb2_grpc
from headgate.router import sampling_params as router
from headgate.router.errors import IncompleteGenerationError, from_proto, from_rpc_error
from headgate.sampling_params import SamplingParams

MAX_MESSAGE_BYTES = 256 << 20
CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
]
FINISH_REASONS = {
    router_pb2.FINISH_REASON_LENGTH: "length",
    router_pb2.FINISH_REASON_EOS_TOKEN: "eos_token",
    router_pb2.FINISH_REASON_STOP_SEQUENCE: "stop_sequence",
    router_pb2.FINISH_REASON_POOLED: "pooled",
}

Params = SamplingParams | router.SamplingParams  # with vLLM's names or the router's own


@dataclass(frozen=True, slots=True)
class Token:
    """One token; `logprob` is None where it was not asked for."""

    id: int
    text: str
    logprob: float | None
    special: bool
    top: tuple[Token, ...] = ()  # the likeliest at this place, best first


@dataclass(frozen=True, slots=True)
class Generation:
    """A whole answer."""

    text: str
    tokens: tuple[Token, ...]
    finish_reason: str  # length, eos_token or stop_sequence
    input_tokens: int
    cached_tokens: int  # prompt tokens that came from the prefix cache
    seed: int | None  # None: greedy
    prefill: tuple[Token, ...] = ()  # the prompt's tokens, with prompt_logprobs=True
    others: tuple[Generation, ...] = ()  # with n: the answers after this one
    score: float | None = None  # with beam_width


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a streamed answer. The last of each answer has the whole in `generation`."""

    text: str
    tokens: tuple[Token, ...]
    generation: Generation | None = None
    index: int = 0  # of the answer, where n asked for several


@dataclass(frozen=True, slots=True)
class Span:
    """A token of a text, and the characters it comes from (0, 0 for special tokens)."""

    id: int
    text: str
    start: int
    stop: int


class Client:
    """Connects lazily; safe to use from several threads. Close it, or use it in a `with`."""

    def __init__(
        self, address: str = "localhost:3001", *, api_key: str = "", timeout: float | None = None
    ) -> None:
        """`address`: HOST:PORT or unix:PATH; `timeout`: seconds a whole call may take."""
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        self._timeout = timeout
        self.stub = router_pb2_grpc.RouterStub(self._channel)

    def generate(
        self,
        prompt: str | Sequence[int],
        params: Params | None = None,
        *,
        request_id: str = "",
        **fields: Any,
    ) -> Generation:
        """The whole answer. `fields` are the router's parameters and override `params`.

        Raises RouterError (TypeError for a field that there is none of).
        """
        request = _request(prompt, params, request_id, fields)
        response = self._call(self.stub.Generate, request)
        others = [_generation(other.finished, other.tokens) for other in response.others]
        return replace(_generation(response.finished, response.tokens), others=tuple(others))

    def stream(
        self,
        prompt: str | Sequence[int],
        params: Params | None = None,
        *,
        request_id: str = "",
        **fields: Any,
    ) -> Iterator[Piece]:
        """The answer in pieces as they are generated; leaving the loop cancels the rest.

        With n, the pieces of several answers alternate.
        """
        request = _request(prompt, params, request_id, fields)
        call = self.stub.GenerateStream(request, metadata=self._metadata, timeout=self._timeout)
        return self._pieces(call)

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[Span]:
        request = router_pb2.TokenizeRequest(text=text, add_special_tokens=add_special_tokens)
        response = self._call(self.stub.Tokenize, request)
        return [Span(span.id, span.text, span.start, span.stop) for span in response.tokens]

    def cancel(self, request_id: str) -> int:
        """Ends the requests with this id; their callers get RequestCancelledError."""
        request = router_pb2.CancelRequest(request_id=request_id)
        return int(self._call(self.stub.Cancel, request).cancelled)

    def info(self) -> router_pb2.InfoResponse:
        """What is served, and with which limits."""
        return self._call(self.stub.Info, router_pb2.InfoRequest())

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _call(self, method: Any, request: Any) -> Any:
        try:
            return method(request, metadata=self._metadata, timeout=self._timeout)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None

    @staticmethod
    def _pieces(call: Any) -> Iterator[Piece]:
        answers: list[list[router_pb2.Token]] = []
        unfinished = 0
        try:
            for event in call:
                kind = event.WhichOneof("event")
                if kind == "accepted":
                    unfinished = event.accepted.num_answers
                    answers = [[] for _ in range(unfinished)]
                elif kind == "tokens":
                    index = event.tokens.index
                    answers[index].extend(event.tokens.tokens)
                    yield Piece(event.tokens.text, _tokens(event.tokens.tokens), index=index)
                elif kind == "finished":
                    index = event.finished.index
                    unfinished -= 1
                    yield Piece("", (), _generation(event.finished, answers[index]), index)
                    if not unfinished:
                        return
                elif kind == "error":
                    raise from_proto(event.error)
            raise IncompleteGenerationError()
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None
        finally:
            call.cancel()


def _request(
    prompt: str | Sequence[int],
    params: Params | None,
    request_id: str,
    fields: dict[str, Any],
) -> router_pb2.GenerateRequest:
    for name in ("stop", "stop_token_ids", "allowed_token_ids", "bad_words"):
        if name in fields:
            value = fields[name]
            fields[name] = (value,) if isinstance(value, str) else tuple(value)
    if isinstance(fields.get("logit_bias"), Mapping):
        fields["logit_bias"] = tuple(fields["logit_bias"].items())
    if isinstance(params, SamplingParams):
        params = params.to_router()
    parameters = replace(params or router.SamplingParams(), **fields).to_proto()
    request = router_pb2.GenerateRequest(parameters=parameters, request_id=request_id)
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.token_ids.ids.extend(prompt)
    return request


def _generation(finished: router_pb2.Finished, tokens: Sequence[router_pb2.Token]) -> Generation:
    return Generation(
        text=finished.generated_text,
        tokens=_tokens(tokens),
        finish_reason=FINISH_REASONS.get(finished.reason, ""),
        input_tokens=finished.input_tokens,
        cached_tokens=finished.cached_tokens,
        seed=finished.seed if finished.HasField("seed") else None,
        prefill=_tokens(finished.prefill),
        score=finished.score if finished.HasField("score") else None,
    )


def _tokens(messages: Sequence[router_pb2.Token]) -> tuple[Token, ...]:
    return tuple(
        Token(
            id=message.id,
            text=message.text,
            logprob=message.logprob if message.HasField("logprob") else None,
            special=message.special,
            top=_tokens(message.top),
        )
        for message in messages
    )
