"""Conversations as `LLM.chat` takes them, made prompts by the served model's ways with chats."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from headgate.prompts import Prompt
from headgate.proto import router_pb2
from headgate.router.errors import RouterError, TemplateError
from headgate.router.gateway.chat_messages import flatten
from headgate.router.gateway.config import GatewayConfig
from headgate.router.gateway.openai_schemas import ChatMessage
from headgate.router.gateway.served_chat import ServedChat
from headgate.router.gateway.tools import ToolUse, function_of

_CONFIG = GatewayConfig(router_address="")  # as the server has it by default


class Chats:
    """One per model. Templates are compiled once."""

    def __init__(self, info: router_pb2.InfoResponse) -> None:
        self._info = info
        self._served: dict[str, ServedChat] = {}

    def prompts(
        self,
        conversations: Sequence[Sequence[Mapping[str, Any]]],
        *,
        template: str | None,
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any] | None,
        continued: bool,
    ) -> list[Prompt]:
        """`template`: the caller's own, or a file that holds it. `tools`: as OpenAI's API has them.

        `variables`: more of them for the template. `continued`: each must end with words of the
        assistant. Raises ValueError naming the conversation.
        """
        chat, use = self._chat(template), _tool_use(tools or ())
        prompts = []
        for index, conversation in enumerate(conversations):
            try:
                flat = flatten(_messages(conversation))
                if continued and flat[-1]["role"] != "assistant":
                    raise ValueError(
                        "`continue_final_message` needs a last message by the assistant"
                    )
                text = chat.render(flat, use, variables)
            except (RouterError, ValueError) as error:
                raise ValueError(f"conversation {index}: {error}") from None
            prompts.append(Prompt(text=text, add_special_tokens=False))
        return prompts

    def _chat(self, source: str | None) -> ServedChat:
        if source and "{" not in source and os.path.isfile(source):
            with open(source) as stream:
                source = stream.read()
        key = source or ""
        if key not in self._served:
            info = self._info
            if source:
                info = router_pb2.InfoResponse(
                    chat_template=source, bos_token=info.bos_token, eos_token=info.eos_token
                )
            try:
                self._served[key] = ServedChat.of(info, _CONFIG)
            except TemplateError as error:
                raise ValueError(str(error)) from None
        return self._served[key]


def _messages(conversation: Sequence[Mapping[str, Any]]) -> list[ChatMessage]:
    try:
        return msgspec.convert(list(conversation), list[ChatMessage])
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from None


def _tool_use(tools: Sequence[Mapping[str, Any]]) -> ToolUse:
    """What is shown to the model. Raises ValueError naming the tool."""
    shown = []
    for index, tool in enumerate(tools):
        if tool.get("type", "function") != "function":
            raise ValueError(f"tools[{index}]: type {tool.get('type')!r} is not supported")
        try:
            shown.append(function_of(tool.get("function"), f"tools[{index}].function"))
        except RouterError as error:
            raise ValueError(error.message) from None
    return ToolUse(tuple(shown))
