"""Headgate: a server for open-weight language models.

    from headgate import LLM, SamplingParams, Client

Names are loaded at their first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headgate.beam_search import BeamSearchOutput, BeamSearchParams, BeamSearchSequence
    from headgate.client import Client
    from headgate.llm import LLM
    from headgate.outputs import CompletionOutput, PoolingRequestOutput, RequestOutput
    from headgate.prompts import TextPrompt, TokensPrompt
    from headgate.sampling_params import SamplingParams
    from headgate.structured_outputs import GuidedDecodingParams, StructuredOutputsParams

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "BeamSearchOutput",
    "BeamSearchParams",
    "BeamSearchSequence",
    "Client",
    "CompletionOutput",
    "GuidedDecodingParams",
    "PoolingRequestOutput",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokensPrompt",
    "__version__",
]

_HOMES = {
    "BeamSearchOutput": "headgate.beam_search",
    "BeamSearchParams": "headgate.beam_search",
    "BeamSearchSequence": "headgate.beam_search",
    "Client": "headgate.client",
    "CompletionOutput": "headgate.outputs",
    "GuidedDecodingParams": "headgate.structured_outputs",
    "LLM": "headgate.llm",
    "PoolingRequestOutput": "headgate.outputs",
    "RequestOutput": "headgate.outputs",
    "SamplingParams": "headgate.sampling_params",
    "StructuredOutputsParams": "headgate.structured_outputs",
    "TextPrompt": "headgate.prompts",
    "TokensPrompt": "headgate.prompts",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
