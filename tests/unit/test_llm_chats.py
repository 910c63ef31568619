"""Conversations of `LLM.chat` as prompts: tools, calls in the history, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from headgate.chats import Chats
from headgate.proto import router_pb2

PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
WITH_TOOLS = (
    "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}{% for m in messages %}"
    "<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}({{ c.function.arguments.city }}){% endfor %}{% endfor %}"
)
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
ASKED = {
    "role": "user",
    "content": [{"type": "text", "text": "Rain"}, {"type": "text", "text": "?"}],
}
CALLED = {
    "role": "assistant",
    "tool_calls": [
        {"id": "1", "type": "function",
         "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}},
    ],
}  # fmt: skip
TOLD = {"role": "tool", "tool_call_id": "1", "content": "Yes"}


def prompt(*messages: Any, model: str = PLAIN, **given: Any) -> str:
    chats = Chats(router_pb2.InfoResponse(chat_template=model))
    options = {"template": None, "tools": None, "variables": None, "continued": False}
    (made,) = chats.prompts([messages], **{**options, **given})
    assert not made.add_special_tokens and made.text is not None
    return made.text


def test_tools_reach_the_template() -> None:
    wanted = "[get_weather]<user>Rain?<assistant>get_weather(Oslo)<tool>Yes"
    assert prompt(ASKED, CALLED, TOLD, model=WITH_TOOLS, tools=[TOOL]) == wanted


def test_a_template_without_tools_has_them_in_the_system_message() -> None:
    text = prompt(ASKED, CALLED, TOLD, tools=[TOOL])
    system, _, rest = text.partition("<user>")
    assert system.startswith("<system>You can call") and '"name": "get_weather"' in system
    assert rest.startswith("Rain?<assistant><tool_call>") and "<tool_response>\nYes" in rest


def test_templates_of_the_callers_own(tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text("{{ messages[0].content }}{{ more }}")
    assert prompt(ASKED, template=str(file), variables={"more": "!"}) == "Rain?!"
    assert prompt(ASKED, template="{{ messages[0].role }}") == "user"
    with pytest.raises(ValueError, match="compile"):
        prompt(ASKED, template="{% if %}")


@pytest.mark.parametrize(
    ("message", "given", "problem"),
    [
        ({"content": "Hi"}, {}, "conversation 0: .*`role`"),
        ({"role": "user"}, {}, r"conversation 0: .*`messages\[0\].content`"),
        ({"role": "user", "content": [{"type": "image_url"}]}, {}, "image_url"),
        (ASKED, {"continued": True}, "conversation 0: `continue_final_message`"),
        (ASKED, {"tools": [{"type": "function"}]}, r"`tools\[0\].function`"),
        (ASKED, {"tools": [{"type": "web_search"}]}, r"tools\[0\].*web_search"),
    ],
)
def test_what_is_refused(message: dict[str, Any], given: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        prompt(message, **given)


def test_a_conversation_of_no_messages() -> None:
    with pytest.raises(ValueError, match="conversation 0"):
        prompt()
