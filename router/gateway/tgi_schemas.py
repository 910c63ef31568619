"""Bodies of TGI's own routes. Shapes only; ranges are the router's to check."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

MAX_UINT32 = 2**32 - 1
MAX_UINT64 = 2**64 - 1

UInt32 = Annotated[int, msgspec.Meta(ge=0, le=MAX_UINT32)]
Seed = Annotated[int, msgspec.Meta(ge=0)]  # its upper bound is above what msgspec can state


class GenerateParameters(msgspec.Struct):
    """`parameters` of /generate. null is as if absent, for every field."""

    best_of: UInt32 | None = None
    temperature: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    typical_p: float | None = None
    do_sample: bool | None = None
    max_new_tokens: UInt32 | None = None
    return_full_text: bool | None = None
    stop: list[str] | None = None
    truncate: UInt32 | None = None
    watermark: bool | None = None
    details: bool | None = None
    decoder_input_details: bool | None = None
    seed: Seed | None = None
    top_n_tokens: UInt32 | None = None
    grammar: Any = None
    adapter_id: str | None = None
    # Beyond TGI's fields:
    min_p: float | None = None
    presence_penalty: float | None = None
    min_new_tokens: UInt32 | None = None
    ignore_eos_token: bool | None = None
    stop_token_ids: list[UInt32] | None = None


class GenerateRequest(msgspec.Struct):
    """Body of /generate, /generate_stream, / and /tokenize."""

    inputs: str
    parameters: GenerateParameters | None = None
    stream: bool | None = None  # read by / only


class VertexRequest(msgspec.Struct):
    """Body of /vertex: bodies of /generate or of chat."""

    instances: list[dict[str, Any]]


class CancelRequest(msgspec.Struct):
    """Body of /cancel."""

    request_id: str
