"""Body of /v1/responses: OpenAI's fields, and the sampling fields of the other /v1 routes."""

from __future__ import annotations

from typing import Any

import msgspec

from headgate.router.gateway.openai_schemas import SamplingFields
from headgate.router.gateway.tgi_schemas import UInt32


class TextConfig(msgspec.Struct):
    """`text`: what the answer looks like."""

    format: dict[str, Any] | None = None
    verbosity: str | None = None  # a variable of the chat template


class ReasoningConfig(msgspec.Struct):
    """`reasoning`: `effort` is a variable of the chat template."""

    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None  # its former name


class ResponseStreamOptions(msgspec.Struct):
    """`include_obfuscation`: nothing here pads its events, so that either value is met."""

    include_obfuscation: bool | None = None


class ResponsesRequest(SamplingFields, kw_only=True):
    """Body of /v1/responses. `input`: a string or a list of items."""

    input: Any
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: UInt32 | None = None
    metadata: dict[str, str] | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: UInt32 | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    include: list[str] | None = None
    top_logprobs: UInt32 | None = None
    truncation: str | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool | None = None
    prompt: Any = None
    context_management: Any = None
    moderation: Any = None
    service_tier: str | None = None
    # Of no effect: nothing is kept per user, and prompts are cached in any case.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: Any = None
    # vLLM's and TGI's own:
    chat_template_kwargs: dict[str, Any] | None = None
    adapter_id: str | None = None
