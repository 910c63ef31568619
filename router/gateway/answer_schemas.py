"""Shapes of the answers, for the API's description only: routes write their JSON themselves.

tests/server/test_openapi.py holds what a live server answers against them.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

Finish = Literal["length", "eos_token", "stop_sequence"]


class ErrorAnswer(msgspec.Struct):
    """What every route outside /v1 answers when it cannot serve a request."""

    error: str
    error_type: str


class OpenAIErrorObject(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str
    http_status_code: int


class OpenAIErrorAnswer(msgspec.Struct):
    """What routes below /v1 answer when they cannot serve a request."""

    error: OpenAIErrorObject
    error_type: str


# ------------------------------------------------------------------------ TGI


class PrefillToken(msgspec.Struct):
    id: int
    text: str
    logprob: float | None


class AnswerToken(msgspec.Struct):
    id: int
    text: str
    logprob: float | None
    special: bool


class Details(msgspec.Struct, kw_only=True):
    finish_reason: Finish
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[AnswerToken]
    top_tokens: list[list[AnswerToken]] | msgspec.UnsetType = msgspec.UNSET
    best_of_sequences: list[dict[str, Any]] | msgspec.UnsetType = msgspec.UNSET


class GenerateAnswer(msgspec.Struct):
    generated_text: str
    details: Details | msgspec.UnsetType = msgspec.UNSET


class TokenSpan(msgspec.Struct):
    """A token and the characters it comes from."""

    id: int
    text: str
    start: int
    stop: int


class ChatTokenizeAnswer(msgspec.Struct):
    tokenize_response: list[TokenSpan]
    templated_text: str


class VertexAnswer(msgspec.Struct):
    predictions: list[str | ChatAnswerMessage]


class CancelAnswer(msgspec.Struct):
    cancelled: int


class VllmAnswer(msgspec.Struct):
    """Prompt and answer as one text."""

    text: list[str]


# --------------------------------------------------------------------- OpenAI


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatAnswerMessage(msgspec.Struct):
    role: Literal["assistant"]
    content: str | None
    tool_calls: list[dict[str, Any]] | msgspec.UnsetType | None = msgspec.UNSET
    reasoning_content: str | msgspec.UnsetType | None = msgspec.UNSET


class ChatChoice(msgspec.Struct):
    index: int
    message: ChatAnswerMessage
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatAnswer(msgspec.Struct):
    object: Literal["chat.completion"]
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionChoice(msgspec.Struct):
    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"]


class CompletionAnswer(msgspec.Struct):
    object: Literal["text_completion"]
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


class EmbeddingUsage(msgspec.Struct):
    prompt_tokens: int
    total_tokens: int


class EmbeddingEntry(msgspec.Struct):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str  # the string: base64


class EmbeddingsAnswer(msgspec.Struct):
    object: Literal["list"]
    data: list[EmbeddingEntry]
    model: str
    usage: EmbeddingUsage


class Response(msgspec.Struct):
    """OpenAI's response object; the fields that say what came of it."""

    object: Literal["response"]
    id: str
    created_at: float
    model: str
    status: Literal["completed", "incomplete"]
    incomplete_details: dict[str, Any] | None
    output: list[dict[str, Any]]
    usage: dict[str, Any] | None


class Model(msgspec.Struct):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(msgspec.Struct):
    object: Literal["list"]
    data: list[Model]


# --------------------------------------------------------------------- server


class Info(msgspec.Struct, kw_only=True):
    model_id: str
    model_sha: str | None
    model_pipeline_tag: str | None
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_tokens: int
    max_total_tokens: int
    validation_workers: int
    max_client_batch_size: int
    router: str
    version: str
    sha: str | None
    docker_label: str | None
    max_top_n_tokens: int
    state: str
    served_model_name: str
    dtype: str
    device: str
    quantize: str
    num_shards: int
    epoch: int
    block_size: int
    max_batch_prefill_tokens: int
    max_batch_total_tokens: int
    max_batch_size: int


class ReadyAnswer(msgspec.Struct):
    state: Literal["ready"]


class UnhealthyAnswer(ErrorAnswer):
    state: str
    detail: str
