"""Tools and reasoning in chat completions: prompts, shapes, streams, refusals, OpenAI's client."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion

from headgate.router.gateway.config import GatewayConfig
from headgate.router.gateway.served_chat import ServedChat
from headgate.router.gateway.tools import ToolUse, function_of, tool_use
from headgate.router.tokenizer import load_chat_files
from tests.unit import fake_router as fake
from tests.unit.fake_router import pb
from tests.unit.running_gateway import RunningGateway

FUNCTION = {
    "name": "get_weather",
    "description": "Weather <now>",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
TOOL = {"type": "function", "function": FUNCTION}
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "Rain?"}], "tools": [TOOL]}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Tokyo"}}\n</tool_call>'
# As published templates do it, in small.
TOOL_TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ '\n' }}<|{{ m.role }}|>"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}{{ c.function.name }}:"
    "{{ c.function.arguments | tojson }}{% endfor %}{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '\n' }}<|assistant|>{% endif %}"
)


def saying(text: str, size: int = 3, reason: int = pb.FINISH_REASON_EOS_TOKEN) -> fake.Script:
    """A router that answers with this text, in tokens of `size` characters."""
    pieces = [text[at : at + size] for at in range(0, len(text), size)]

    async def script(conversation: fake.Conversation, submit: pb.Submit) -> None:
        conversation.send(submit, fake.accepted())
        for index, piece in enumerate(pieces):
            new = fake.token(index, piece)
            event = fake.tokens(index, new, text=piece, offset=index * size)
            conversation.send(submit, event)
        conversation.send(submit, fake.finished(text, len(pieces), reason))  # type: ignore[arg-type]

    return script


def served(template: str, tool_template: str = "", **config: str) -> ServedChat:
    info = pb.InfoResponse(chat_template=template, tool_chat_template=tool_template)
    return ServedChat.of(info, GatewayConfig(router_address="", **config))  # type: ignore[arg-type]


USE = tool_use([function_of(FUNCTION, "tools[0]")], None, parallel=True)


# ------------------------------------------------------------------- answers


async def test_a_prediction_of_vertex_is_a_message_where_it_holds_calls() -> None:
    async with RunningGateway(saying("Let me look.\n" + CALL)) as running:
        plain = {"messages": ASK["messages"]}
        body = {"instances": [ASK, plain, {"inputs": "Rain?"}]}
        called, *texts = (await running.http.post("/vertex", json=body)).json()["predictions"]
        assert texts == ["Let me look.\n" + CALL] * 2
        assert (called["role"], called["content"]) == ("assistant", "Let me look.")
        (call,) = called["tool_calls"]
        assert call["function"] == {"name": "get_weather", "arguments": '{"city": "Tokyo"}'}
    async with RunningGateway(saying("Sunny.")) as running:
        answer = await running.http.post("/vertex", json={"instances": [ASK]})
        assert answer.json() == {"predictions": ["Sunny."]}


async def test_a_call() -> None:
    async with RunningGateway(saying("Let me look.\n" + CALL)) as running:
        body = (await running.http.post("/v1/chat/completions", json=ASK)).json()
        (choice,) = body["choices"]
        (call,) = choice["message"].pop("tool_calls")
        assert choice == {
            "index": 0,
            "message": {"role": "assistant", "content": "Let me look."},
            "logprobs": None,
            "finish_reason": "tool_calls",
        }
        assert call.pop("id").startswith("call_")
        assert call == {
            "type": "function",
            "function": {"name": "get_weather", "arguments": '{"city": "Tokyo"}'},
        }


async def test_a_streamed_call() -> None:
    async with RunningGateway(saying("Look.\n" + CALL)) as running:
        events = await running.stream("/v1/chat/completions", {**ASK, "stream": True})
        assert events.pop() == "[DONE]"
        assert all(event["usage"] is None for event in events)
        deltas = [event["choices"][0]["delta"] for event in events]
        assert deltas[0] == {"role": "assistant", "content": "Loo"}
        assert deltas[1] == {"content": "k."}
        (first,) = deltas[2].pop("tool_calls")
        assert deltas[2] == {}
        assert first.pop("id").startswith("call_")
        assert first == {
            "index": 0,
            "type": "function",
            "function": {"name": "get_weather", "arguments": ""},
        }
        pieces = [delta["tool_calls"] for delta in deltas[3:-1]]
        assert len(pieces) > 3
        assert all(entry.keys() == {"index", "function"} for (entry,) in pieces)
        arguments = "".join(entry["function"]["arguments"] for (entry,) in pieces)
        assert json.loads(arguments) == {"city": "Tokyo"}
        reasons = [event["choices"][0]["finish_reason"] for event in events]
        assert reasons == [None] * (len(events) - 1) + ["tool_calls"] and deltas[-1] == {}


@pytest.mark.parametrize("reason", [pb.FINISH_REASON_EOS_TOKEN, pb.FINISH_REASON_LENGTH])
async def test_openai_client(reason: int) -> None:
    text = CALL + CALL.replace("Tokyo", "Oslo")
    async with RunningGateway(saying(text, reason=reason)) as running:
        url = f"http://127.0.0.1:{running.port}/v1"
        client = openai.AsyncOpenAI(base_url=url, api_key="-", max_retries=0)
        whole: ChatCompletion = await client.chat.completions.create(model="tgi", **ASK)
        answers = [whole]
        if reason != pb.FINISH_REASON_LENGTH:  # the client's helper refuses what was cut
            async with client.chat.completions.stream(model="tgi", **ASK) as stream:
                async for _ in stream:
                    pass
                answers.append(await stream.get_final_completion())
        for answer in answers:
            message = answer.choices[0].message
            assert [json.loads(call.function.arguments) for call in message.tool_calls] == [
                {"city": "Tokyo"}, {"city": "Oslo"},
            ]  # fmt: skip
            cut = reason == pb.FINISH_REASON_LENGTH
            assert answer.choices[0].finish_reason == ("length" if cut else "tool_calls")


async def test_text_instead_of_a_call() -> None:
    broken = CALL.replace('"Tokyo"', "Tokyo")
    for text in ("No rain.", broken, '{"name": "get_weather"}'):
        async with RunningGateway(saying(text)) as running:
            body = (await running.http.post("/v1/chat/completions", json=ASK)).json()
            assert body["choices"][0]["message"] == {"role": "assistant", "content": text}
            assert body["choices"][0]["finish_reason"] == "stop"
            events = await running.stream("/v1/chat/completions", {**ASK, "stream": True})
            choices = [event["choices"][0] for event in events[:-1]]
            content = "".join(choice["delta"].get("content", "") for choice in choices)
            assert content == text and choices[-1]["finish_reason"] == "stop"


async def test_logprobs_of_every_token_stay() -> None:
    async with RunningGateway(saying(CALL)) as running:
        body = {**ASK, "logprobs": True}
        whole = (await running.http.post("/v1/chat/completions", json=body)).json()
        events = await running.stream("/v1/chat/completions", {**body, "stream": True})
        streamed = [
            entry
            for event in events[:-1]
            for entry in (event["choices"][0]["logprobs"] or {"content": []})["content"]
        ]
        assert streamed == whole["choices"][0]["logprobs"]["content"]
        assert "".join(entry["token"] for entry in streamed) == CALL


async def test_one_call_where_parallel_ones_are_not_wanted() -> None:
    async with RunningGateway(saying(CALL * 2)) as running:
        body = {**ASK, "parallel_tool_calls": False}
        answer = (await running.http.post("/v1/chat/completions", json=body)).json()
        assert len(answer["choices"][0]["message"]["tool_calls"]) == 1


async def test_none_leaves_text_as_it_is() -> None:
    async with RunningGateway(saying(CALL)) as running:
        body = {**ASK, "tool_choice": "none"}
        answer = (await running.http.post("/v1/chat/completions", json=body)).json()
        assert answer["choices"][0]["message"] == {"role": "assistant", "content": CALL}
        assert "get_weather" not in running.router.requests[-1].text


async def test_formats_whose_mark_is_a_special_token_see_it() -> None:
    text = '[TOOL_CALLS] [{"name": "get_weather", "arguments": {}}]'
    async with RunningGateway(saying(text), tool_call_parser="mistral") as running:
        answer = (await running.http.post("/v1/chat/completions", json=ASK)).json()
        assert len(answer["choices"][0]["message"]["tool_calls"]) == 1
        parameters = running.router.requests[-1].parameters
        assert parameters.HasField("skip_special_tokens") and not parameters.skip_special_tokens


async def test_reasoning() -> None:
    text = "<think>\nHm.\n</think>\n\nTokyo"
    messages = {"messages": ASK["messages"]}
    async with RunningGateway(saying(text), reasoning_parser="deepseek_r1") as running:
        answer = (await running.http.post("/v1/chat/completions", json=messages)).json()
        assert answer["choices"][0]["message"] == {
            "role": "assistant", "content": "Tokyo", "reasoning_content": "Hm.",
        }  # fmt: skip
        events = await running.stream("/v1/chat/completions", {**messages, "stream": True})
        deltas = [event["choices"][0]["delta"] for event in events[:-1]]
        assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Hm."
        assert "".join(delta.get("content", "") for delta in deltas) == "Tokyo"
    async with RunningGateway(saying(text)) as running:  # this template has no such tags
        answer = (await running.http.post("/v1/chat/completions", json=messages)).json()
        assert answer["choices"][0]["message"] == {"role": "assistant", "content": text}


# ------------------------------------------------------------------ grammars

STRICT = {"type": "function", "function": {**FUNCTION, "name": "strict", "strict": True}}


async def grammar_of(running: RunningGateway, **change: Any) -> pb.Grammar:
    body = {**ASK, "tools": [TOOL, STRICT], **change}
    response = await running.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return running.router.requests[-1].parameters.grammar


async def test_required_and_named_calls_have_a_grammar() -> None:
    async with RunningGateway(saying(CALL)) as running:
        tags = (await grammar_of(running, tool_choice="required")).structural_tags
        assert [tag.begin for tag in tags.tags] == [
            f'<tool_call>\n{{"name": "{name}", "arguments": ' for name in ("get_weather", "strict")
        ]
        assert {tag.end for tag in tags.tags} == {"}\n</tool_call>"}
        assert json.loads(tags.tags[0].json_schema) == FUNCTION["parameters"]
        assert not tags.triggers and not tags.single and tags.separator == "\n"
        one = await grammar_of(running, tool_choice="required", parallel_tool_calls=False)
        assert one.structural_tags.single and not one.structural_tags.separator
        named = {"type": "function", "function": {"name": "get_weather"}}
        tags = (await grammar_of(running, tool_choice=named)).structural_tags
        assert len(tags.tags) == 1 and tags.single


async def test_calls_of_strict_tools_have_one() -> None:
    async with RunningGateway(saying(CALL)) as running:
        tags = (await grammar_of(running)).structural_tags
        assert tags.triggers == ["<tool_call>"]
        schemas = [json.loads(tag.json_schema) for tag in tags.tags]
        assert schemas == [{"type": "object"}, FUNCTION["parameters"]]
        assert not (await grammar_of(running, tools=[TOOL])).WhichOneof("kind")
        assert not (await grammar_of(running, tool_choice="none")).WhichOneof("kind")


async def test_tools_beside_a_response_format() -> None:
    async with RunningGateway(saying(CALL)) as running:
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
        tags = (await grammar_of(running, response_format=form)).structural_tags
        assert tags.single and (tags.tags[-1].begin, tags.tags[-1].end) == ("", "")
        body = {**ASK, "tool_choice": "required", "response_format": form}
        response = await running.http.post("/v1/chat/completions", json=body)
        assert response.json()["error"]["param"] == "tool_choice"
        response = await running.http.post(
            "/v1/chat/completions", json={**ASK, "guided_regex": "a+"}
        )
        assert response.json()["error"]["param"] == "tools"


async def test_a_schema_that_cannot_be_followed_is_the_tools() -> None:
    async def refuse(conversation: fake.Conversation, submit: pb.Submit) -> None:
        conversation.send(submit, fake.error("validation", 422, "not valid", field="grammar"))

    async with RunningGateway(refuse) as running:
        body = {**ASK, "tool_choice": "required"}
        response = await running.http.post("/v1/chat/completions", json=body)
        assert response.json()["error"]["param"] == "tools"


async def test_what_has_a_form_is_not_taken_for_reasoning() -> None:
    async with RunningGateway(saying('{"a": 1}'), reasoning_parser="deepseek_r1") as running:
        body = {"messages": ASK["messages"], "response_format": {"type": "json_object"}}
        answer = (await running.http.post("/v1/chat/completions", json=body)).json()
        assert answer["choices"][0]["message"] == {"role": "assistant", "content": '{"a": 1}'}
    text = "<think>Hm.</think>" + CALL  # a model may write what it likes before a strict call
    async with RunningGateway(saying(text), reasoning_parser="deepseek_r1") as running:
        body = {**ASK, "tools": [TOOL, STRICT]}
        answer = (await running.http.post("/v1/chat/completions", json=body)).json()
        message = answer["choices"][0]["message"]
        assert (message["content"], message["reasoning_content"]) == (None, "Hm.")
        assert message["tool_calls"][0]["function"]["name"] == "get_weather"


# ------------------------------------------------------------------- prompts

HISTORY = [
    {"role": "user", "content": "Rain?"},
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "Look.",
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "get_weather", "arguments": '{"city": "Tokyo"}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "wet"},
    {"role": "tool", "tool_call_id": "call_2", "content": "cold"},
]


async def prompt_of(messages: list[dict[str, Any]], template: str, **more: Any) -> str:
    async with RunningGateway() as running:
        running.gateway.services.known_info().chat_template = template
        body = {"messages": messages, **more}
        response = await running.http.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        return running.router.requests[-1].text


async def test_a_template_that_knows_tools() -> None:
    text = await prompt_of(HISTORY, TOOL_TEMPLATE, tools=[TOOL])
    shown, *lines = text.split("\n")
    assert json.loads(shown) == [TOOL]
    assert lines == [
        "<|user|>Rain?",
        '<|assistant|><think>Look.</think>get_weather:{"city": "Tokyo"}',
        "<|tool|>wet",
        "<|tool|>cold",
        "<|assistant|>",
    ]


async def test_a_template_that_does_not() -> None:
    text = await prompt_of(HISTORY, fake.TEMPLATE, tools=[TOOL])
    system, rest = text.split("<|end|>\n", 1)
    assert system.startswith("<|system|>You can call")
    assert '<tool_call>\n{"name": "NAME", "arguments": {...}}\n</tool_call>' in system
    assert json.loads(system.splitlines()[-1]) == TOOL
    assert rest == (
        f"<|user|>Rain?<|end|>\n<|assistant|>{CALL}<|end|>\n"
        "<|user|><tool_response>\nwet\n</tool_response>\n<tool_response>\ncold\n</tool_response>"
        "<|end|>\n<|assistant|>"
    )


def test_where_the_tool_prompt_goes() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Rain?"}]
    text = served(fake.TEMPLATE).render(messages, USE)
    assert text.startswith("<|system|>Be brief.\n\nYou can call")
    assert "\nSay it.\nFunctions:\n" in "\n" + served(fake.TEMPLATE).render(
        messages[1:], USE, None, "Say it."
    ).removeprefix("<|system|>")
    no_system = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    text = served(no_system + fake.TEMPLATE).render(messages[1:], USE)
    assert text.startswith("<|user|>You can call") and "\n\nRain?<|end|>" in text
    text = served(TOOL_TEMPLATE).render(messages, USE, None, "Say it.")
    assert "Rain?\n---\nSay it.\n" in text


def test_a_template_of_its_own_for_tools() -> None:
    chat = served("plain {{ messages[0].content }}", "tools {{ tools[0].function.name }}")
    messages = [{"role": "user", "content": "Hi"}]
    assert chat.render(messages, USE) == "tools get_weather"
    assert chat.render(messages, ToolUse()) == "plain Hi"


def test_named_templates_are_found(tmp_path: Any) -> None:
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    files = load_chat_files(tmp_path)
    assert (files.chat_template, files.tool_chat_template) == ("a", "b")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_text("c")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("d")
    files = load_chat_files(tmp_path)
    assert (files.chat_template, files.tool_chat_template) == ("c", "d")


def test_developers_are_system_to_most_templates() -> None:
    messages = [{"role": "developer", "content": "x"}]
    assert served(fake.TEMPLATE).render(messages, ToolUse()).startswith("<|system|>x")
    knows = "{# developer #}" + fake.TEMPLATE
    assert served(knows).render(messages, ToolUse()).startswith("<|developer|>x")


# ------------------------------------------------------------------ requests

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{}]}, "tools[0]"),
    ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0]"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    (
        {"tools": [{"type": "function", "function": {"name": "a", "parameters": []}}]},
        "tools[0].function.parameters",
    ),
    (
        {"tools": [{"type": "function", "function": {"name": "a", "description": 1}}]},
        "tools[0].function.description",
    ),
    ({"tools": [TOOL, TOOL]}, "tools"),
    ({"tools": [], "tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": "nobody"}, "tool_choice"),
    ({"tool_choice": {"type": "custom", "custom": {"name": "x"}}}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {}}}, "tool_choice"),
    ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"tools": []}}}, "tool_choice"),
    ({"tool_choice": 3}, "tool_choice"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{}]}]},
        "messages[0].tool_calls[0].function",
    ),
]


async def test_refusals() -> None:
    async with RunningGateway() as running:
        for change, field in REFUSED:
            response = await running.http.post("/v1/chat/completions", json={**ASK, **change})
            assert response.status_code == 422, change
            assert response.json()["error"]["param"] == field, change


def test_choices() -> None:
    tools = [function_of({"name": name}, "tools") for name in ("a", "b")]

    def use(choice: Any) -> tuple[set[str], bool]:
        result = tool_use(tools, choice, parallel=True)
        return set(result.callable_names), result.required

    by_name = {"type": "function", "function": {"name": "b"}}
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [by_name]}}
    assert use(None) == use("auto") == ({"a", "b"}, False)
    assert use("required") == ({"a", "b"}, True)
    assert use("none") == (set(), False)
    assert use("b") == use(by_name) == use({"type": "function", "name": "b"}) == ({"b"}, True)
    assert use(allowed) == ({"b"}, False)
    in_responses = {
        "type": "allowed_tools",
        "mode": "required",
        "tools": [{**by_name, "name": "b"}],
    }
    assert use(in_responses) == ({"b"}, True)
    assert tool_use(tools, "required", parallel=True).parallel
    assert not tool_use(tools, by_name, parallel=True).parallel
