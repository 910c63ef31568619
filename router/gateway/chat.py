"""Chat messages to prompt text, with the model's own template in Jinja's sandbox.

Template texts come from model files and are not trusted: no attribute or file access. Does not
tokenise; the rendered text holds its special tokens already.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.ext import loopcontrols as LoopControls
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from headgate.router.errors import TemplateError
from headgate.router.gateway.errors import MissingTemplateVariableError

Message = Mapping[str, Any]

# Contents arrive flattened to a string here, so a template that digs for the first part of a
# list would take a character instead.
_FIRST_PART = "messages[0]['content'][0]['text']"
_FIRST_TEXT = "messages[0]['content']"
_END_MARK = "\ufdd0end of content\ufdd0"  # of a message to be continued; a noncharacter
_RESERVED = frozenset({"messages", "bos_token", "eos_token", "add_generation_prompt"})


class _GenerationBlocks(Extension):
    """{% generation %} blocks mark answers for training; here only their content counts."""

    tags = {"generation"}  # noqa: RUF012 (so declared by Jinja)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled template with the tokens it may print."""

    def __init__(self, source: str, bos_token: str, eos_token: str) -> None:
        """Raises TemplateError where there is no template or it does not compile."""
        if not source:
            raise TemplateError()
        self.source = source
        self._bos_token = bos_token
        self._eos_token = eos_token
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[LoopControls, _GenerationBlocks]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            tree = environment.parse(source.replace(_FIRST_PART, _FIRST_TEXT))
            self.variables = frozenset(meta.find_undeclared_variables(tree))  # that it reads
            self._template = environment.from_string(tree)
        except jinja2.TemplateError as error:
            raise TemplateError(f"the model's template does not compile: {error}") from None

    def render(
        self,
        messages: Sequence[Message],
        extra: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The prompt text. A last message by the assistant is left open, to be continued.

        `extra`: more variables for the template. `tools`: as templates know them. Raises
        TemplateError.
        """
        extra = {**(extra or {}), "tools": tools or None}
        last = messages[-1] if messages else {}
        if last.get("role") != "assistant" or last.get("tool_calls") or not last.get("content"):
            return self._render(messages, extra, add_generation_prompt=True)
        # The content alone may be found in the template's own text behind it.
        marked = {**last, "content": f"{last['content']}{_END_MARK}"}
        text = self._render([*messages[:-1], marked], extra, add_generation_prompt=False)
        begun, mark, _ = text.rpartition(_END_MARK)
        if not mark:
            raise TemplateError(
                "the template does not show the last message, which was to be continued",
                field="messages",
            )
        return begun.rstrip()

    def _render(
        self, messages: Sequence[Message], extra: Mapping[str, Any], add_generation_prompt: bool
    ) -> str:
        variables = {key: value for key, value in extra.items() if key not in _RESERVED}
        try:
            variables |= {
                "messages": messages,
                "bos_token": self._bos_token,
                "eos_token": self._eos_token,
                "add_generation_prompt": add_generation_prompt,
            }
            return self._template.render(variables)
        except jinja2.UndefinedError as error:
            raise MissingTemplateVariableError(str(error)) from None
        except Exception as error:  # a template is code: any error in it is its own
            raise TemplateError(str(error) or type(error).__name__, field="messages") from None


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models were trained on it: no HTML escapes, unlike Jinja's own filter."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
