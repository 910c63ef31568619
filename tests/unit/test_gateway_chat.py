"""Chat templates: rendering, the sandbox, the helpers, continuing the last message."""

from __future__ import annotations

import re
from datetime import datetime

import pytest

from headgate.router.errors import TemplateError
from headgate.router.gateway.chat import ChatTemplate
from headgate.router.gateway.errors import MissingTemplateVariableError
from tests.unit.fake_router import TEMPLATE
from tests.unit.running_gateway import RunningGateway


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def render(source: str, *messages: dict[str, str]) -> str:
    return ChatTemplate(source, "<s>", "</s>").render(messages or [user("Hi")])


def test_tokens_and_prompt() -> None:
    source = "{{ bos_token }}" + TEMPLATE + "{{ eos_token }}"
    assert render(source) == "<s><|user|>Hi<|end|>\n<|assistant|></s>"


def test_block_lines_leave_no_white_space() -> None:
    source = (
        "{% for m in messages %}\n    {% if true %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}"
    )
    assert render(source) == "Hi\n"


def test_helpers() -> None:
    assert render("{{ {'a': '<é>'} | tojson }}") == '{"a": "<é>"}'
    assert render("{{ [1] | tojson(indent=2) }}") == "[\n  1\n]"
    year = render("{{ strftime_now('%Y') }}")
    assert abs(int(year) - datetime.now().year) <= 1
    assert (
        render("{% for x in [1, 2] %}{% if x == 2 %}{% break %}{% endif %}{{ x }}{% endfor %}")
        == "1"
    )
    assert render("{% generation %}{{ messages[0].content }}{% endgeneration %}") == "Hi"
    assert render("{{ messages[0]['content'][0]['text'] }}") == "Hi"
    assert render("{{ messages[::-1][0].content.strip() }}") == "Hi"


def test_more_variables_do_not_hide_the_fixed_ones() -> None:
    template = ChatTemplate("{{ thinking }}{{ bos_token }}", "<s>", "</s>")
    assert template.render([user("Hi")], {"thinking": "on", "bos_token": "x"}) == "on<s>"


def test_raise_exception() -> None:
    with pytest.raises(TemplateError, match=r"^Template error: roles must alternate$"):
        render("{{ raise_exception('roles must alternate') }}")


def test_missing_variable() -> None:
    with pytest.raises(MissingTemplateVariableError, match=r"^Missing template variable: .*nobody"):
        render("{{ nobody.name }}")


@pytest.mark.parametrize("source", ["", "{% if %}", "{{ 'a' + 1 }}", "{{ 1 // 0 }}"])
def test_broken_templates(source: str) -> None:
    with pytest.raises(TemplateError):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
    ],
)
def test_the_sandbox_holds(source: str) -> None:
    with pytest.raises(TemplateError):
        render(source)


def test_last_assistant_message_is_continued() -> None:
    messages = user("Hi"), {"role": "assistant", "content": "Tokyo is the "}
    assert render(TEMPLATE, *messages) == "<|user|>Hi<|end|>\n<|assistant|>Tokyo is the"


@pytest.mark.parametrize("content", ["assistant", "e", "end", ">", "\n|"])
def test_continued_content_that_the_template_has_too(content: str) -> None:
    messages = user("Hi"), {"role": "assistant", "content": content}
    assert render(TEMPLATE, *messages) == "<|user|>Hi<|end|>\n<|assistant|>" + content


def test_continued_content_that_the_template_trims() -> None:
    source = TEMPLATE.replace("{{ m.content }}", "{{ m.content | trim }}")
    messages = user("Hi"), {"role": "assistant", "content": " Tokyo "}
    assert render(source, *messages) == "<|user|>Hi<|end|>\n<|assistant|>Tokyo"


def test_continued_content_that_is_not_shown() -> None:
    with pytest.raises(TemplateError, match="to be continued"):
        render("{{ messages[0].content }}", user("Hi"), {"role": "assistant", "content": "No"})


async def test_parts_are_joined_and_errors_keep_their_status() -> None:
    async with RunningGateway() as running:
        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
        body = {"messages": [{"role": "user", "content": parts}]}
        assert (await running.http.post("/v1/chat/completions", json=body)).status_code == 200
        assert "<|user|>ab<|end|>" in running.router.requests[0].text
        running.gateway.services.state.info.chat_template = "{{ raise_exception('no') }}"  # type: ignore[union-attr]
        response = await running.http.post("/v1/chat/completions", json={**body, "stream": True})
        assert response.status_code == 422
        assert response.json()["error_type"] == "template_error"
        failures = running.router.last.got("failure")
        assert re.search("template_error", str(failures))


def test_variables_of_any_name() -> None:
    template = ChatTemplate("{{ self_ }}{{ x }}", "", "")
    assert template.render([user("Hi")], {"self": 1, "x": 2, "self_": 3}) == "32"


async def test_a_long_chat_is_rendered_off_the_loop() -> None:
    async with RunningGateway() as running:
        body = {"messages": [{"role": "user", "content": "x" * 100_000}]}
        assert (await running.http.post("/v1/chat/completions", json=body)).status_code == 200
        assert len(running.router.requests[0].text) > 100_000
