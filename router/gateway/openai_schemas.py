"""Bodies of the /v1 routes: OpenAI's fields, and those vLLM adds. Shapes only."""

from __future__ import annotations

from typing import Any

import msgspec

from headgate.router.gateway.tgi_schemas import UInt32


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class SamplingFields(msgspec.Struct, kw_only=True):
    """How tokens are chosen and what ends an answer. null is as if absent, for every field."""

    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    # vLLM's and TGI's own:
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: UInt32 | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[UInt32] | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    watermark: bool | None = None


class CommonFields(SamplingFields, kw_only=True):
    """What chat and text completions share."""

    model: str | None = None
    logit_bias: dict[str, float] | None = None  # by token id
    max_tokens: UInt32 | None = None
    n: UInt32 | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None  # accepted, of no effect: nothing here is kept per user
    # vLLM's and TGI's own:
    top_n: UInt32 | None = None  # alternatives per token; asks for logprobs too
    best_of: UInt32 | None = None
    allowed_token_ids: list[UInt32] | None = None
    bad_words: list[str] | None = None
    prompt_logprobs: UInt32 | None = None  # of the prompt's tokens, with as many alternatives
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    early_stopping: bool | str | None = None
    adapter_id: str | None = None
    # What the answer must be; at most one of these.
    response_format: dict[str, Any] | None = None
    grammar: Any = None  # TGI's
    structured_outputs: dict[str, Any] | None = None  # vLLM's, and those before it:
    guided_json: Any = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_json_object: bool | None = None


class ChatMessage(msgspec.Struct):
    """One message. `content`: a string, or a list of parts of which only texts are served."""

    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[Any] | None = None
    function_call: Any = None
    audio: Any = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None  # of an earlier answer, for templates that show it


class ChatRequest(CommonFields, kw_only=True):
    """Body of /v1/chat/completions."""

    messages: list[ChatMessage]
    logprobs: bool | None = None
    top_logprobs: UInt32 | None = None
    max_completion_tokens: UInt32 | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    tool_prompt: str | None = None
    parallel_tool_calls: bool | None = None
    functions: list[Any] | None = None
    function_call: Any = None
    modalities: list[str] | None = None
    audio: Any = None
    chat_template_kwargs: dict[str, Any] | None = None
    # Variables of the chat template, where it knows them.
    reasoning_effort: str | None = None
    verbosity: str | None = None
    # Nothing is stored, looked up or judged here, and nobody is served before others.
    store: bool | None = None
    web_search_options: Any = None
    moderation: Any = None
    prediction: Any = None
    service_tier: str | None = None
    # Of no effect: nothing is kept per user, and prompts are cached in any case.
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: Any = None


class CompletionRequest(CommonFields, kw_only=True):
    """Body of /v1/completions. `prompt`: a string, token ids, or a list of either."""

    prompt: Any
    suffix: str | None = None
    echo: bool | None = None
    logprobs: UInt32 | None = None
    add_special_tokens: bool | None = None
