"""Tool calls of Hermes and Qwen models: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.

Several calls follow each other, or share a tag as a list.
"""

from __future__ import annotations

from headgate.router.gateway.parsers.tool_parser import CallFormat, ToolParser


class HermesParser(ToolParser):
    """A closing tag that is missing is not missed."""

    mark = "<tool_call>"
    close = "</tool_call>"
    trigger = mark
    written = CallFormat('<tool_call>\n{"name": ', ', "arguments": ', "}\n</tool_call>", "\n")
