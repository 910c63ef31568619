"""What each route takes and answers: the rows that the API's description is made from.

A route's examples are requests that any server answers with 200; a test posts each of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from headgate.router.gateway import answer_schemas as answers
from headgate.router.gateway.embeddings import EmbeddingsRequest
from headgate.router.gateway.openai_schemas import ChatRequest, CompletionRequest
from headgate.router.gateway.responses_schemas import ResponsesRequest
from headgate.router.gateway.tgi_schemas import CancelRequest, GenerateRequest, VertexRequest
from headgate.router.gateway.vllm_schemas import VllmGenerateRequest

EVENTS = "text/event-stream"
LINES = "application/x-ndjson"


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path."""

    method: str  # in lower case
    path: str
    tag: str
    summary: str
    bodies: tuple[type, ...] = ()  # of which one is sent; empty: no body
    answers: tuple[Any, ...] = ()  # of which one comes as JSON; empty: an empty body
    streams: tuple[str, ...] = ()  # media types of streamed answers
    statuses: tuple[int, ...] = ()  # of refusals
    examples: Mapping[str, Any] = field(default_factory=dict)

    @property
    def protected(self) -> bool:
        """Whether the API key is asked for."""
        return self.method == "post"


_BODY = (400, 401, 413, 415, 422, 503)
_INFERENCE = (400, 401, 404, 413, 415, 422, 424, 429, 499, 500, 503)
_CHAT = [{"role": "user", "content": "What is the capital of Japan?"}]
_CAPITAL = "The capital of Japan is"
_NATIVE = {"inputs": _CAPITAL, "parameters": {"max_new_tokens": 5}}
_CHAT_BODY = {"model": "tgi", "messages": _CHAT, "max_tokens": 8}
_TEXT_BODY = {"model": "tgi", "prompt": _CAPITAL, "max_tokens": 5}
_SHORT = {"max_output_tokens": 8}
_HEALTH = "200 from the first readiness on, 503 before it and after a failure"

OPERATIONS: tuple[Operation, ...] = (
    Operation(
        "post",
        "/generate",
        "TGI",
        "A whole answer, or vLLM's where the body has `prompt`",
        (GenerateRequest, VllmGenerateRequest),
        (answers.GenerateAnswer, answers.VllmAnswer),
        (LINES, "application/octet-stream"),
        _INFERENCE,
        {
            "greedy": _NATIVE,
            "details": {
                "inputs": _CAPITAL,
                "parameters": {
                    "max_new_tokens": 5,
                    "details": True,
                    "decoder_input_details": True,
                    "top_n_tokens": 2,
                },
            },
            "sampled": {
                "inputs": _CAPITAL,
                "parameters": {
                    "max_new_tokens": 8,
                    "temperature": 0.7,
                    "top_p": 0.95,
                    "seed": 7,
                    "stop": ["."],
                },
            },
            "vllm": {"prompt": "San Francisco is a", "max_tokens": 7, "temperature": 0},
        },
    ),
    Operation(
        "post",
        "/generate_stream",
        "TGI",
        "An event for each token",
        (GenerateRequest,),
        (),
        (EVENTS,),
        _INFERENCE,
        {"stream": _NATIVE},
    ),
    Operation(
        "post",
        "/",
        "TGI",
        "A list with one answer, prompt included, or events where `stream` is true",
        (GenerateRequest,),
        (list[answers.GenerateAnswer],),
        (EVENTS,),
        _INFERENCE,
        {"whole": _NATIVE, "stream": {**_NATIVE, "stream": True}},
    ),
    Operation("get", "/", "Server", _HEALTH, statuses=(503,)),
    Operation(
        "post",
        "/tokenize",
        "TGI",
        "The tokens of `inputs`",
        (GenerateRequest,),
        (list[answers.TokenSpan],),
        (),
        _BODY,
        {"text": {"inputs": _CAPITAL}},
    ),
    Operation(
        "post",
        "/chat_tokenize",
        "TGI",
        "The tokens of a chat, as the model's template writes it",
        (ChatRequest,),
        (answers.ChatTokenizeAnswer,),
        (),
        _BODY,
        {"chat": {"messages": _CHAT}},
    ),
    Operation(
        "post",
        "/cancel",
        "Server",
        "Ends the requests with this `x-request-id`",
        (CancelRequest,),
        (answers.CancelAnswer,),
        (),
        (*_BODY, 404),
    ),
    Operation(
        "post",
        "/v1/chat/completions",
        "OpenAI",
        "Chat, whole or as events",
        (ChatRequest,),
        (answers.ChatAnswer,),
        (EVENTS,),
        _INFERENCE,
        {
            "chat": _CHAT_BODY,
            "stream": {**_CHAT_BODY, "stream": True, "stream_options": {"include_usage": True}},
            "logprobs": {**_CHAT_BODY, "temperature": 0, "logprobs": True, "top_logprobs": 2},
        },
    ),
    Operation(
        "post",
        "/v1/completions",
        "OpenAI",
        "Text completion of one or several prompts, whole or as events",
        (CompletionRequest,),
        (answers.CompletionAnswer,),
        (EVENTS,),
        _INFERENCE,
        {
            "text": _TEXT_BODY,
            "prompts": {**_TEXT_BODY, "prompt": [_CAPITAL, "The capital of France is"]},
            "stream": {**_TEXT_BODY, "stream": True},
        },
    ),
    Operation(
        "post",
        "/v1/responses",
        "OpenAI",
        "The Responses API without a memory, whole or as events",
        (ResponsesRequest,),
        (answers.Response,),
        (EVENTS,),
        _INFERENCE,
        {
            "text": {"model": "tgi", "input": "What is the capital of Japan?", **_SHORT},
            "stream": {"model": "tgi", "input": "Hi", "stream": True, **_SHORT},
        },
    ),
    Operation(
        "post",
        "/v1/embeddings",
        "OpenAI",
        "Embeddings of one or several inputs",
        (EmbeddingsRequest,),
        (answers.EmbeddingsAnswer,),
        (),
        _INFERENCE,
        {
            "text": {"model": "tgi", "input": "Tokyo"},
            "several": {"input": ["Tokyo", "Oslo"], "encoding_format": "base64"},
        },
    ),
    Operation(
        "post",
        "/invocations",
        "Platforms",
        "SageMaker: the body of /, of chat or of text completion",
        (GenerateRequest, ChatRequest, CompletionRequest),
        (list[answers.GenerateAnswer], answers.ChatAnswer, answers.CompletionAnswer),
        (EVENTS,),
        _INFERENCE,
        {"native": _NATIVE, "chat": _CHAT_BODY, "text": _TEXT_BODY},
    ),
    Operation(
        "post",
        "/vertex",
        "Platforms",
        "Vertex AI: several requests in one",
        (VertexRequest,),
        (answers.VertexAnswer,),
        (),
        _INFERENCE,
        {"instances": {"instances": [_NATIVE, {"messages": _CHAT, "max_tokens": 8}]}},
    ),
    Operation("get", "/health", "Server", _HEALTH, statuses=(503,)),
    Operation("get", "/ping", "Server", _HEALTH, statuses=(503,)),
    Operation("get", "/health/live", "Server", "200 while the gateway runs"),
    Operation(
        "get",
        "/health/ready",
        "Server",
        "200 while requests are computed at once",
        answers=(answers.ReadyAnswer,),
        statuses=(503,),
    ),
    Operation(
        "get",
        "/info",
        "Server",
        "Model and limits",
        answers=(answers.Info,),
        statuses=(503,),
    ),
    Operation(
        "get",
        "/v1/models",
        "OpenAI",
        "What is served",
        answers=(answers.ModelList,),
        statuses=(503,),
    ),
    Operation(
        "get",
        "/v1/models/{model}",
        "OpenAI",
        "The same for one name",
        answers=(answers.Model,),
        statuses=(404, 503),
    ),
    Operation(
        "get",
        "/metrics",
        "Server",
        "Metrics in Prometheus' text format",
        streams=("text/plain",),
        statuses=(429, 500, 503),
    ),
    Operation("get", "/openapi.json", "Server", "This description", answers=(dict[str, Any],)),
    Operation(
        "get",
        "/api-doc/openapi.json",
        "Server",
        "This description, where TGI has it",
        answers=(dict[str, Any],),
    ),
    Operation(
        "get", "/docs", "Server", "A page that shows this description", streams=("text/html",)
    ),
)
