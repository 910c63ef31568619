"""The served model's ways with chats: its template, how it is told of tools, how it calls them.

Messages come flattened (chat_messages.py); what leaves is a prompt, and a parser for its answer.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headgate.proto import router_pb2
from headgate.router.errors import TemplateError
from headgate.router.gateway.chat import ChatTemplate, Message
from headgate.router.gateway.config import GatewayConfig
from headgate.router.gateway.parsers.choice import (
    begins_in_reasoning,
    splits_reasoning,
    tool_parser,
)
from headgate.router.gateway.parsers.deltas import Parser, PlainParser
from headgate.router.gateway.parsers.reasoning import ReasoningParser
from headgate.router.gateway.parsers.tool_parser import CallFormat, ToolParser
from headgate.router.gateway.tool_grammar import answer_grammar
from headgate.router.gateway.tools import ToolUse

_LONG_CHAT = 65_536  # characters; longer ones are rendered off the event loop
_MESSAGE_COST = 100  # characters that take as long to render as a message by itself
_INSTRUCTION = (
    "You can call the functions listed below. To call one, write nothing but the call, with a JSON "
    "object as its arguments, in this form:"
)


@dataclass(frozen=True, slots=True)
class ServedChat:
    """Made once per model."""

    template: ChatTemplate
    tool_template: ChatTemplate  # for chats with tools; may be the same
    tool_parser: type[ToolParser]
    splits_reasoning: bool
    reasoning_choice: str  # of --reasoning-parser

    @classmethod
    def of(cls, info: router_pb2.InfoResponse, config: GatewayConfig) -> ServedChat:
        """Raises TemplateError where the model has no template or it does not compile."""
        tokens = info.bos_token, info.eos_token
        template = tool_template = ChatTemplate(info.chat_template, *tokens)
        source = info.tool_chat_template or info.chat_template
        if info.tool_chat_template:
            tool_template = ChatTemplate(source, *tokens)
        return cls(
            template,
            tool_template,
            tool_parser(config.tool_call_parser, source),
            splits_reasoning(config.reasoning_parser, info.chat_template),
            config.reasoning_parser,
        )

    def knows(self, variable: str) -> bool:
        """Whether a template reads this variable."""
        return variable in self.template.variables or variable in self.tool_template.variables

    async def prompt(
        self,
        messages: Sequence[Message],
        use: ToolUse,
        extra: Mapping[str, Any] | None = None,
        instruction: str | None = None,
    ) -> str:
        """The prompt text. Raises TemplateError.

        `extra`: more variables for the template. `instruction`: the client's own words about tools.
        """
        if sum(_MESSAGE_COST + len(message["content"]) for message in messages) > _LONG_CHAT:
            return await asyncio.to_thread(self.render, messages, use, extra, instruction)
        return self.render(messages, use, extra, instruction)

    def render(
        self,
        messages: Sequence[Message],
        use: ToolUse,
        extra: Mapping[str, Any] | None = None,
        instruction: str | None = None,
    ) -> str:
        """As `prompt`, in the caller's thread."""
        messages = [self._with_known_role(message) for message in messages]
        template = self.template
        if use.tools or any(message.get("tool_calls") for message in messages):
            template = self.tool_template
        if "tools" in template.variables:
            tools = [tool.for_template() for tool in use.tools]
            if tools and instruction:
                messages[-1] = _appended(messages[-1], f"\n---\n{instruction}")
            return template.render(messages, extra, tools)
        written = _written_out(messages, self.tool_parser.written)
        if not use.tools:
            return template.render(written, extra)
        text = self._tool_prompt(use, instruction)
        try:
            return template.render(_with_system_text(written, text), extra)
        except TemplateError:  # there are templates that take no system message
            return template.render(_with_user_text(written, text), extra)

    def grammar(self, use: ToolUse, wanted: router_pb2.Grammar | None) -> router_pb2.Grammar | None:
        """What the answer must be, its calls included. `wanted`: what the client asks of it.

        Raises ValidationError.
        """
        return answer_grammar(use, self.tool_parser, wanted)

    def parser(
        self, use: ToolUse, prompt: str, grammar: router_pb2.Grammar | None
    ) -> Parser | None:
        """A parser for the answer to this prompt; None: all of it is content.

        `grammar`: of the answer. With a form from its first token on it has no reasoning.
        """
        parser: Parser | None = None
        if use.callable_names:
            parser = self.tool_parser(use.callable_names, parallel=use.parallel)
        has_form = grammar is not None and not grammar.structural_tags.triggers
        if self.splits_reasoning and not has_form:
            begun = begins_in_reasoning(self.reasoning_choice, prompt)
            parser = ReasoningParser(parser or PlainParser(), begun=begun)
        return parser

    def needs_special_tokens(self, use: ToolUse) -> bool:
        """Whether the parser must see special tokens, which texts leave out by default."""
        return bool(use.callable_names) and self.tool_parser.mark_is_special

    def _with_known_role(self, message: Message) -> Message:
        """OpenAI's "developer" is what templates call "system", but for those that know it."""
        if message["role"] != "developer" or "developer" in self.template.source:
            return message
        return {**message, "role": "system"}

    def _tool_prompt(self, use: ToolUse, instruction: str | None) -> str:
        """What stands in for a template's own text about tools."""
        if instruction is None:
            example = self.tool_parser.written.write("NAME", "{...}")
            instruction = f"{_INSTRUCTION}\n{example}"
        tools = (json.dumps(tool.for_template(), ensure_ascii=False) for tool in use.tools)
        return "\n".join((instruction, "Functions:", *tools))


class ServedChats:
    """The ServedChat of the model that is served now, made when it changes."""

    def __init__(self, config: GatewayConfig) -> None:
        self._config = config
        self._chat: ServedChat | None = None
        self._key: tuple[str, ...] = ()

    def of(self, info: router_pb2.InfoResponse) -> ServedChat:
        """Raises TemplateError."""
        key = (info.chat_template, info.tool_chat_template, info.bos_token, info.eos_token)
        if self._chat is None or key != self._key:
            self._chat, self._key = ServedChat.of(info, self._config), key
        return self._chat


def _written_out(messages: Sequence[Message], form: CallFormat) -> list[Message]:
    """Calls and results as text, for a template that knows neither."""
    result: list[Message] = []
    after_result = False
    for message in messages:
        if message["role"] == "tool":
            text = f"<tool_response>\n{message['content']}\n</tool_response>"
            if after_result:  # roles often must alternate
                result[-1] = _appended(result[-1], f"\n{text}")
            else:
                result.append({"role": "user", "content": text})
        elif message.get("tool_calls"):
            result.append({"role": message["role"], "content": _calls_text(message, form)})
        else:
            result.append(message)
        after_result = message["role"] == "tool"
    return result


def _calls_text(message: Message, form: CallFormat) -> str:
    functions = [call["function"] for call in message["tool_calls"]]
    calls = form.separator.join(
        form.write(function["name"], json.dumps(function["arguments"], ensure_ascii=False))
        for function in functions
    )
    return f"{message['content']}\n{calls}" if message["content"] else calls


def _with_system_text(messages: list[Message], text: str) -> list[Message]:
    if messages[0]["role"] == "system":
        return [_appended(messages[0], f"\n\n{text}"), *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def _with_user_text(messages: list[Message], text: str) -> list[Message]:
    """The text before what the user says first."""
    for place, message in enumerate(messages):
        if message["role"] == "user":
            first = {**message, "content": f"{text}\n\n{message['content']}"}
            return [*messages[:place], first, *messages[place + 1 :]]
    return messages


def _appended(message: Message, text: str) -> Message:
    return {**message, "content": message["content"] + text}
