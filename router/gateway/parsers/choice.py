"""Which parsers a model's answers want: by the flags, or by the marks in its chat template."""

from __future__ import annotations

from headgate.router.gateway.parsers.hermes import HermesParser
from headgate.router.gateway.parsers.llama3 import Llama3Parser
from headgate.router.gateway.parsers.mistral import MistralParser
from headgate.router.gateway.parsers.reasoning import CLOSE, OPEN
from headgate.router.gateway.parsers.tool_parser import ToolParser

AUTO = "auto"
OFF = "off"
DEEPSEEK = "deepseek_r1"

TOOL_PARSERS: dict[str, type[ToolParser]] = {
    "hermes": HermesParser,
    "llama3_json": Llama3Parser,
    "pythonic": Llama3Parser,  # vLLM's name where a Llama writes calls as Python does
    "mistral": MistralParser,
}


def tool_parser(choice: str, template: str) -> type[ToolParser]:
    """`choice`: a key of TOOL_PARSERS, or "auto". `template`: the source that shows tools."""
    if choice != AUTO:
        return TOOL_PARSERS[choice]
    if MistralParser.mark in template:
        return MistralParser
    if "<|start_header_id|>" in template and "ipython" in template:
        return Llama3Parser
    return HermesParser


def splits_reasoning(choice: str, template: str) -> bool:
    """Whether answers may begin with reasoning."""
    return choice == DEEPSEEK or (choice == AUTO and OPEN in template)


def begins_in_reasoning(choice: str, prompt: str) -> bool:
    """Whether an answer to this prompt is reasoning from its first character.

    R1's first templates left the opening tag to the model, which may then forget it.
    """
    end = prompt.rstrip()
    return end.endswith(OPEN) or (choice == DEEPSEEK and not end.endswith(CLOSE))
