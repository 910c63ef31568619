"""What a schema's types do not say of its fields: ranges, and a phrase for people.

By name: a name means the same in all three APIs. Ranges that depend on the server are filled in
from its limits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headgate.proto import router_pb2
from headgate.router.sampling_params import MAX_BAD_WORDS

_TWO = {"minimum": -2, "maximum": 2}
_SHARE = {"exclusiveMinimum": 0, "maximum": 1}

PHRASES: Mapping[str, str] = {
    "inputs": "The prompt.",
    "prompt": "The prompt; completions take token ids and lists of prompts too.",
    "messages": "The chat so far.",
    "model": "Absent, `tgi`, `dummy`, the model id or its served name.",
    "stream": "Events instead of one answer.",
    "stream_options": "`include_usage`: a last event with the counts.",
    "parameters": "Left out altogether it means sampling, `{}` means greedy.",
    "max_new_tokens": "Length of the answer; absent: as many as fit.",
    "max_tokens": "Length of the answer; absent: as many as fit (vLLM's /generate: 16).",
    "max_completion_tokens": "The same as `max_tokens`.",
    "min_tokens": "No end before this many tokens.",
    "min_new_tokens": "No end before this many tokens.",
    "do_sample": "Sample; so does any of temperature (but 1), top_k, top_p, typical_p, min_p.",
    "temperature": "Below 1 sharpens, above 1 flattens; 0 is greedy but on TGI's routes.",
    "top_k": "Only the k most likely tokens.",
    "top_p": "The most likely tokens that together have this probability.",
    "typical_p": "Tokens of usual surprise that together have this probability.",
    "min_p": "Only tokens at least this likely relative to the best.",
    "repetition_penalty": "Divides the logits of tokens of prompt and answer.",
    "frequency_penalty": "For each occurrence in the answer.",
    "presence_penalty": "Once for each token that is in the answer.",
    "seed": "The same seed gives the same answer.",
    "stop": "Texts that end the answer.",
    "stop_token_ids": "Tokens that end the answer.",
    "allowed_token_ids": "No other tokens are chosen.",
    "bad_words": "Texts that the answer may not hold.",
    "ignore_eos": "Go on to the greatest length.",
    "ignore_eos_token": "Go on to the greatest length.",
    "truncate": "Keep only the last tokens of the prompt.",
    "truncate_prompt_tokens": "Keep only the last tokens of the prompt.",
    "return_full_text": "Put the prompt before the answer.",
    "details": "Tokens, logprobs, reason of the end.",
    "decoder_input_details": "Logprobs of the prompt too.",
    "top_n_tokens": "Alternatives at each place.",
    "logprobs": "Logprobs of the answer's tokens.",
    "top_logprobs": "Alternatives at each place.",
    "watermark": "Favour tokens so that a detector can tell.",
    "adapter_id": "The adapter to apply.",
    "request_id": "The `x-request-id` of requests that run or wait.",
    "instances": "Bodies of /generate or of chat.",
    "echo": "Put the prompt before the answer.",
    "n": "Answers to each prompt.",
    "best_of": "Answers made, of which the best by mean logprob are given.",
    "user": "Accepted, of no effect.",
    "tools": "Functions that the model may call.",
    "tool_choice": "Whether it may, must not or must call one.",
    "parallel_tool_calls": "False: one call at most.",
    "reasoning_effort": "A variable of the chat template.",
    "input": "The prompt: text or items; of embeddings, one or several.",
    "instructions": "The system message.",
    "max_output_tokens": "Length of the answer; absent: as many as fit.",
    "encoding_format": "Of embeddings: numbers, or their bytes.",
}


_TEXT = {"type": "string", "minLength": 1}
_IDS = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
_PART: dict[str, Any] = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
}
_FUNCTION: dict[str, Any] = {
    "type": "object",
    "required": ["name"],
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]{1,16}$"},
        "description": {"type": "string"},
        "parameters": {"type": "object"},
    },
    "additionalProperties": False,
}
_TOOL = {
    "type": "object",
    "required": ["type", "function"],
    "properties": {"type": {"const": "function"}, "function": _FUNCTION},
    "additionalProperties": False,
}
_FLAT_TOOL = {
    **_FUNCTION,
    "required": ["type", "name"],
    "properties": {"type": {"const": "function"}, **_FUNCTION["properties"]},
}
_ITEM = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {
        "role": {"enum": ["user", "assistant", "system", "developer"]},
        "content": {"type": "string", "minLength": 1},
    },
    "additionalProperties": False,
}
_ABSENT = {"type": "null", "description": "Not served."}
_OFF = {"enum": [False, None], "description": "Only false is served."}
_NOT_FORCED = {"enum": ["auto", "none", None]}
_BIAS = {
    "type": ["object", "null"],
    "patternProperties": {
        "^[0-9]{1,2}$": {"type": "number", "minimum": -100, "maximum": 100},
    },
    "additionalProperties": False,
}
_ANY_OBJECT = {"type": ["object", "null"]}

_SCHEMA = {
    "type": "object",
    "required": ["type"],
    "properties": {"type": {"enum": ["string", "integer", "boolean"]}},
    "additionalProperties": False,
}
_PATTERN = {"type": "string", "pattern": r"^[a-c]{1,3}(\[xyz\]){0,2}$"}


def _kinds(**kinds: Any) -> dict[str, Any]:
    """Objects with `type` and one more field; or null."""
    return {"anyOf": [*kinds.values(), {"type": "null"}]}


def _object(**properties: Any) -> dict[str, Any]:
    """An object that has all of these and nothing else."""
    return {
        "type": "object",
        "required": list(properties),
        "properties": properties,
        "additionalProperties": False,
    }


_GRAMMAR = _kinds(
    regex=_object(type={"const": "regex"}, value=_PATTERN),
    json=_object(type={"enum": ["json", "json_object"]}, value=_SCHEMA),
    json_schema=_object(type={"const": "json_schema"}, value=_object(schema=_SCHEMA)),
)
_FORMAT = _kinds(
    text=_object(type={"enum": ["text", "json_object"]}),
    json_schema=_object(
        type={"const": "json_schema"},
        json_schema=_object(name={"type": "string"}, schema=_SCHEMA),
    ),
)
_STRUCTURED = _kinds(
    regex=_object(regex=_PATTERN),
    json=_object(json=_SCHEMA),
    choice=_object(choice={"type": "array", "minItems": 1, "items": _TEXT}),
    json_object=_object(json_object={"const": True}),
)
_COMMON: Mapping[str, Any] = {
    "adapter_id": _ABSENT,
    "grammar": _GRAMMAR,
    "response_format": _FORMAT,
    "structured_outputs": _STRUCTURED,
    "guided_json": {"anyOf": [_SCHEMA, {"type": "null"}]},
    "guided_regex": {"anyOf": [_PATTERN, {"type": "null"}]},
    "guided_choice": {
        "anyOf": [{"type": "array", "minItems": 1, "items": _TEXT}, {"type": "null"}]
    },
    "guided_grammar": {"type": ["string", "null"]},
    "guided_json_object": {"type": ["boolean", "null"]},
}

_TEXT_FORMAT = _kinds(
    text=_object(type={"enum": ["text", "json_object"]}),
    json_schema=_object(type={"const": "json_schema"}, name={"type": "string"}, schema=_SCHEMA),
)
_NAMED = {"type": {"const": "function"}}
_CHOICES = {"enum": ["auto", "none", "required", None]}
_TOOL_CHOICE = {"anyOf": [_CHOICES, _object(**_NAMED, function=_object(name=_TEXT))]}
_FLAT_TOOL_CHOICE = {"anyOf": [_CHOICES, _object(**_NAMED, name=_TEXT)]}
_CALLS = {
    "type": ["array", "null"],
    "items": _object(
        id=_TEXT,
        type={"const": "function"},
        function=_object(name=_TEXT, arguments={"type": "string"}),
    ),
}

# Fields whose types leave open what they hold, and those that are not served, by schema.
_UNSERVED: Mapping[str, Mapping[str, Any]] = {
    "GenerateParameters": {"grammar": _GRAMMAR, "adapter_id": _ABSENT},
    "ChatRequest": {
        **_COMMON,
        **dict.fromkeys(("functions", "audio", "web_search_options", "moderation"), _ABSENT),
        "function_call": _NOT_FORCED,
        "store": _OFF,
        "tool_choice": _TOOL_CHOICE,
        **dict.fromkeys(("prediction", "prompt_cache_options"), _ANY_OBJECT),
        "tools": {"type": ["array", "null"], "items": _TOOL},
        "modalities": {"enum": [["text"], None]},
    },
    "ChatMessage": {**dict.fromkeys(("function_call", "audio"), _ABSENT), "tool_calls": _CALLS},
    "CompletionRequest": {
        **_COMMON,
        "suffix": _ABSENT,
    },
    "ResponsesRequest": {
        "adapter_id": _ABSENT,
        **dict.fromkeys(
            (
                "previous_response_id", "conversation", "prompt", "context_management",
                "moderation",
            ),
            _ABSENT,
        ),
        **dict.fromkeys(("store", "background"), _OFF),
        "input": {"anyOf": [_TEXT, {"type": "array", "minItems": 1, "items": _ITEM}]},
        "truncation": {"enum": ["disabled", None]},
        "tools": {"type": ["array", "null"], "items": _FLAT_TOOL},
        "tool_choice": _FLAT_TOOL_CHOICE,
        "prompt_cache_options": _ANY_OBJECT,
    },
    "TextConfig": {"format": _TEXT_FORMAT},
    "EmbeddingsRequest": {
        "input": {"anyOf": [_TEXT, _IDS, {"type": "array", "minItems": 1, "items": _TEXT}]},
        "encoding_format": {"enum": ["float", "base64", None]},
        "dimensions": _ABSENT,
    },
    "VllmGenerateRequest": {
        "flat_logprobs": _OFF,
        **dict.fromkeys(
            (
                "logits_processors", "guided_decoding", "logprob_token_ids",
                "thinking_token_budget", "repetition_detection", "extra_args",
            ),
            _ABSENT,
        ),
        "logit_bias": _BIAS,
        "structured_outputs": _STRUCTURED,
        "early_stopping": {"enum": [True, False, "never", None]},
        "spaces_between_special_tokens": {"enum": [True, None]},
    },
}  # fmt: skip
SHAPES: Mapping[tuple[str, str], dict[str, Any]] = {
    ("CompletionRequest", "prompt"): {
        "anyOf": [_TEXT, _IDS, {"type": "array", "minItems": 1, "maxItems": 4, "items": _TEXT}]
    },
    ("ChatMessage", "role"): {
        "type": "string",
        "enum": ["system", "developer", "user", "assistant", "tool"],
    },
    ("ChatMessage", "content"): {
        "anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": _PART}]
    },
    **{
        (schema, field): shape
        for schema, fields in _UNSERVED.items()
        for field, shape in fields.items()
    },
    ("VertexRequest", "instances"): {
        "type": "array",
        "items": {
            "anyOf": [
                {"$ref": "#/components/schemas/GenerateRequest"},
                {"$ref": "#/components/schemas/ChatRequest"},
            ]
        },
    },
}


# Beyond what the schemas ask for: a message without content is one with tool calls.
REQUIRED: Mapping[str, list[str]] = {"ChatMessage": ["role", "content"]}


def ranges(info: router_pb2.InfoResponse) -> dict[str, dict[str, Any]]:
    """Name of a field to JSON-schema keywords for its values that are not null."""
    new_tokens = {"minimum": 1, "maximum": max(info.max_total_tokens - 1, 1)}
    alternatives = {"minimum": 0, "maximum": info.max_top_n_tokens}
    return {
        "inputs": {"minLength": 1},
        "prompt": {"minLength": 1},
        "messages": {"minItems": 1},
        "instances": {"minItems": 1, "maxItems": info.max_concurrent_requests},
        "request_id": {"minLength": 1},
        "model": {"enum": ["tgi", info.served_model_name or info.model_id]},
        "max_new_tokens": new_tokens,
        "max_tokens": new_tokens,
        "max_completion_tokens": new_tokens,
        "truncate": {"minimum": 1, "maximum": info.max_input_tokens},
        "truncate_prompt_tokens": {"minimum": 1, "maximum": info.max_input_tokens},
        "stop": {"maxItems": info.max_stop_sequences, "items": {"type": "string", "minLength": 1}},
        "bad_words": {"maxItems": MAX_BAD_WORDS, "items": {"type": "string", "minLength": 1}},
        "n": {"minimum": 1, "maximum": info.max_concurrent_requests},
        "best_of": {"minimum": 1, "maximum": info.max_best_of},
        "top_n_tokens": alternatives,
        "top_logprobs": alternatives,
        "top_n": alternatives,
        "temperature": {"minimum": 0},
        "top_p": _SHARE,
        "typical_p": _SHARE,
        "min_p": {"minimum": 0, "maximum": 1},
        "repetition_penalty": {"exclusiveMinimum": 0},
        "frequency_penalty": _TWO,
        "presence_penalty": _TWO,
        "seed": {"minimum": 0, "maximum": 2**64 - 1},
    }
