"""/v1/responses: items in, items out, the order of events, refusals, OpenAI's client."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from openai.types.responses import Response

from headgate.router.errors import ValidationError
from headgate.router.gateway.responses_input import messages_of
from tests.unit import fake_router as fake
from tests.unit.fake_router import pb
from tests.unit.running_gateway import RunningGateway
from tests.unit.test_gateway_tools import CALL, FUNCTION, saying

TOOL = {"type": "function", **FUNCTION, "strict": False}
MESSAGE_EVENTS = [
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
]


async def ask(running: RunningGateway, body: dict[str, Any]) -> dict[str, Any]:
    response = await running.http.post("/v1/responses", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def stream(running: RunningGateway, body: dict[str, Any]) -> list[dict[str, Any]]:
    async with running.http.stream("POST", "/v1/responses", json={**body, "stream": True}) as got:
        frames = (await got.aread()).decode().split("\n\n")
    assert frames.pop() == ""
    events = []
    for number, frame in enumerate(frames):
        name, data = frame.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == number
        events.append(event)
    return events


def kinds(events: list[dict[str, Any]]) -> list[str]:
    """The events' types, runs of one type told once."""
    names = [event["type"] for event in events]
    return [name for at, name in enumerate(names) if at == 0 or names[at - 1] != name]


async def test_a_whole_response() -> None:
    async with RunningGateway(saying("Tokyo.")) as running:
        body = {
            "model": "tgi", "input": "Capital of Japan?", "instructions": "Be brief.",
            "metadata": {"a": "b"}, "temperature": 0.5, "top_p": 0.9, "max_output_tokens": 9,
            "user": "me", "store": False, "service_tier": "auto", "truncation": "disabled",
            "reasoning": {"effort": "low"}, "text": {"format": {"type": "text"}}, "top_k": 3,
        }  # fmt: skip
        answer = await ask(running, body)
        Response.model_validate(answer, strict=True)
        (item,) = answer.pop("output")
        assert item.pop("id").startswith("msg_") and answer.pop("id").startswith("resp_")
        assert item == {
            "type": "message",
            "status": "completed",
            "role": "assistant",
            "content": [
                {"type": "output_text", "text": "Tokyo.", "annotations": [], "logprobs": []}
            ],
        }
        assert answer.pop("created_at") <= answer.pop("completed_at")
        assert answer == {
            "object": "response", "status": "completed", "background": False, "error": None,
            "incomplete_details": None, "instructions": "Be brief.", "max_output_tokens": 9,
            "max_tool_calls": None, "metadata": {"a": "b"}, "model": "model",
            "parallel_tool_calls": True, "previous_response_id": None,
            "reasoning": {"effort": "low", "summary": None}, "service_tier": "default",
            "store": False, "temperature": 0.5, "text": {"format": {"type": "text"}},
            "tool_choice": "auto", "tools": [], "top_logprobs": 0, "top_p": 0.9,
            "truncation": "disabled", "user": "me",
            "usage": {
                "input_tokens": 3,
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": 2,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": 5,
            },
        }  # fmt: skip
        (request,) = running.router.requests
        assert request.text == (
            "<|system|>Be brief.<|end|>\n<|user|>Capital of Japan?<|end|>\n<|assistant|>"
        )
        parameters = request.parameters
        assert (parameters.max_new_tokens, parameters.top_k, parameters.include_stop) == (
            9, 3, False,
        )  # fmt: skip


async def test_events_of_a_message() -> None:
    async with RunningGateway(saying("Tokyo is big.")) as running:
        events = await stream(running, {"input": "Hi"})
        assert kinds(events) == [
            "response.created",
            "response.in_progress",
            *MESSAGE_EVENTS,
            "response.completed",
        ]
        assert (
            events[0]["response"]["status"] == "in_progress" and not events[0]["response"]["output"]
        )
        assert "".join(e["delta"] for e in events if "delta" in e) == "Tokyo is big."
        done = events[-2]["item"]
        assert done["content"][0]["text"] == "Tokyo is big." and done["status"] == "completed"
        assert events[2]["item"]["content"] == [] and events[2]["item"]["status"] == "in_progress"
        assert events[3]["part"]["text"] == ""
        assert events[-1]["response"]["output"] == [done]
        assert events[-1]["response"]["usage"]["total_tokens"] == 8


async def test_events_of_reasoning_text_and_calls() -> None:
    text = "<think>Hm.</think>Look: " + CALL + CALL.replace("Tokyo", "Oslo") + " done"
    async with RunningGateway(saying(text), reasoning_parser="deepseek_r1") as running:
        body = {"input": "Rain?", "tools": [TOOL]}
        events = await stream(running, body)
        reasoning = [name.replace("output_text", "reasoning_text") for name in MESSAGE_EVENTS]
        call = [
            "response.output_item.added",
            "response.function_call_arguments.delta",
            "response.function_call_arguments.done",
            "response.output_item.done",
        ]
        assert kinds(events)[2:-1] == [*reasoning, *MESSAGE_EVENTS, *call, *call, *MESSAGE_EVENTS]
        output = events[-1]["response"]["output"]
        assert [item["type"] for item in output] == [
            "reasoning", "message", "function_call", "function_call", "message",
        ]  # fmt: skip
        assert output[0]["content"] == [{"type": "reasoning_text", "text": "Hm."}]
        assert [item["arguments"] for item in output[2:4]] == [
            '{"city": "Tokyo"}', '{"city": "Oslo"}',
        ]  # fmt: skip
        assert output[2]["call_id"] != output[3]["call_id"]
        for index, item in enumerate(output):
            own = [event for event in events if event.get("output_index") == index]
            assert own[0]["item"]["id"] == own[-1]["item"]["id"] == item["id"]
            assert all(event.get("item_id", item["id"]) == item["id"] for event in own)
            assert own[-1]["item"] == item
        whole = await ask(running, body)
        assert [_without_ids(item) for item in whole["output"]] == [
            _without_ids(item) for item in output
        ]
        details = whole["usage"]["output_tokens_details"]
        assert details == events[-1]["response"]["usage"]["output_tokens_details"]
        assert 0 < details["reasoning_tokens"] < whole["usage"]["output_tokens"]


def _without_ids(item: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in item.items() if key not in ("id", "call_id")}


async def test_what_the_length_cut_is_incomplete() -> None:
    cut = saying(CALL[:60], reason=pb.FINISH_REASON_LENGTH)
    async with RunningGateway(cut) as running:
        for body in ({"input": "Hi"}, {"input": "Hi", "tools": [TOOL]}):
            answer = await ask(running, body)
            assert answer["status"] == "incomplete"
            assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
            assert answer["output"][-1]["status"] == "incomplete"
            events = await stream(running, body)
            assert events[-1]["type"] == "response.incomplete"
            assert events[-1]["response"]["status"] == "incomplete"
        assert answer["output"][0]["arguments"].startswith('{"city"')


async def test_a_broken_call() -> None:
    broken = CALL.replace('"Tokyo"', "Tokyo")
    async with RunningGateway(saying(broken)) as running:
        events = await stream(running, {"input": "Hi", "tools": [TOOL]})
        call, message = events[-1]["response"]["output"]
        assert call["status"] == "incomplete" and call["type"] == "function_call"
        assert message["content"][0]["text"] == broken


async def test_logprobs() -> None:
    async with RunningGateway(saying("Look. " + CALL)) as running:
        body = {"input": "Hi", "tools": [TOOL], "include": ["message.output_text.logprobs"]}
        answer = await ask(running, {**body, "top_logprobs": 2})
        parameters = running.router.requests[-1].parameters
        assert parameters.logprobs and parameters.top_n_tokens == 2
        logprobs = answer["output"][0]["content"][0]["logprobs"]
        assert [entry["token"] for entry in logprobs] == ["Loo", "k. "]
        events = await stream(running, body)
        streamed = [
            entry["token"]
            for event in events
            if event["type"] == "response.output_text.delta"
            for entry in event["logprobs"]
        ]
        assert streamed == ["Loo", "k. "]
        assert not running.router.requests[-1].parameters.top_n_tokens


async def test_text_formats() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "name": "x", "schema": schema, "strict": True}
    async with RunningGateway(saying('{"a": 1}')) as running:
        answer = await ask(running, {"input": "Hi", "text": {"format": form}})
        assert answer["text"] == {"format": form}
        grammar = running.router.requests[-1].parameters.grammar
        assert json.loads(grammar.json_schema) == schema
        await ask(running, {"input": "Hi", "text": {"format": {"type": "json_object"}}})
        assert running.router.requests[-1].parameters.grammar.json_object
        await ask(running, {"input": "Hi", "tools": [TOOL], "tool_choice": "required"})
        assert running.router.requests[-1].parameters.grammar.structural_tags.tags
        for wrong in ({"type": "xml"}, {"type": "json_schema", "name": "x"}):
            body = {"input": "Hi", "text": {"format": wrong}}
            response = await running.http.post("/v1/responses", json=body)
            assert response.json()["error"]["param"] == "text.format"


async def test_errors() -> None:
    async def script(conversation: fake.Conversation, submit: pb.Submit) -> None:
        conversation.send(submit, fake.accepted())
        conversation.send(submit, fake.tokens(0, fake.token(1, "To"), text="To", offset=0))
        conversation.send(submit, fake.error("generation", 424, "Request failed"))

    async with RunningGateway(script) as running:
        events = await stream(running, {"input": "Hi"})
        assert events[-1]["type"] == "response.failed"
        failed = events[-1]["response"]
        assert failed["status"] == "failed"
        assert failed["error"] == {"code": "server_error", "message": "Request failed"}
        Response.model_validate(failed)
        response = await running.http.post("/v1/responses", json={"input": "Hi"})
        assert response.status_code == 424

    async def refuse(conversation: fake.Conversation, submit: pb.Submit) -> None:
        conversation.send(submit, fake.error("validation", 422, "too long", field="max_new_tokens"))

    async with RunningGateway(refuse) as running:
        for streaming in (False, True):
            body = {"input": "Hi", "stream": streaming}
            response = await running.http.post("/v1/responses", json=body)
            assert response.status_code == 422
            assert response.json()["error"]["param"] == "max_output_tokens"


async def test_tools_are_told_as_they_were_given() -> None:
    deep: dict[str, Any] = {"const": 2**70}
    for _ in range(300):
        deep = {"anyOf": deep}
    tools = [{"type": "function", "name": "f", "parameters": deep}]
    async with RunningGateway() as running:
        response = await running.http.post("/v1/responses", json={"input": "Hi", "tools": tools})
        assert response.status_code == 200
        assert response.json()["tools"] == tools


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"store": True}, "store"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"background": True}, "background"),
    ({"prompt": {"id": "pmpt_1"}}, "prompt"),
    ({"context_management": [{"type": "compaction"}]}, "context_management"),
    ({"moderation": {"model": "x"}}, "moderation"),
    ({"truncation": "auto"}, "truncation"),
    ({"tools": [{"type": "web_search"}]}, "tools[0]"),
    ({"tools": [{"type": "function"}]}, "tools[0].name"),
    ({"tool_choice": {"type": "file_search"}}, "tool_choice"),
    ({"input": []}, "input"),
    ({"input": [3]}, "input[0]"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
    ({"input": [{"type": ["message"], "content": "x"}]}, "input[0]"),
    ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
    ({"input": [{"role": "user"}]}, "input[0].content"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
    ({"input": [{"type": "function_call", "call_id": "x"}]}, "input[0].name"),
    ({"input": [{"type": "function_call_output", "call_id": "x"}]}, "input[0].output"),
]


async def test_refusals() -> None:
    async with RunningGateway() as running:
        for change, field in REFUSED:
            body = {"input": "Hi", "tools": [TOOL], **change}
            response = await running.http.post("/v1/responses", json=body)
            assert response.status_code == 422, change
            assert response.json()["error"]["param"] == field, change
        response = await running.http.post("/v1/responses", json={})
        assert response.json()["error"]["param"] == "input"
        body = {"input": "Hi", "include": ["reasoning.encrypted_content"]}
        response = await running.http.post("/v1/responses", json=body)
        warning = response.headers["x-headgate-warnings"]
        assert warning == "include ignored: reasoning.encrypted_content"


def test_items_become_messages() -> None:
    items: list[dict[str, Any]] = [
        {"role": "developer", "content": "Be kind."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Rain?"}]},
        {"type": "reasoning", "id": "rs", "summary": [], "content": [
            {"type": "reasoning_text", "text": "Hm."}
        ]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Look."}]},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": '{"a": 1}'},
        {"type": "function_call", "call_id": "2", "name": "g", "arguments": "{"},
        {"type": "function_call_output", "call_id": "1", "output": "wet"},
        {"type": "function_call_output", "call_id": "2", "output": [
            {"type": "input_text", "text": "cold"}
        ]},
        {"type": "reasoning", "summary": [], "encrypted_content": "x"},
        {"type": "function_call", "call_id": "3", "name": "f", "arguments": ""},
    ]  # fmt: skip
    assert messages_of(items, "Be brief.") == [
        {"role": "system", "content": "Be brief.\n\nBe kind."},
        {"role": "user", "content": "Rain?"},
        {
            "role": "assistant",
            "reasoning_content": "Hm.",
            "content": "Look.",
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}},
                {"id": "2", "type": "function", "function": {"name": "g", "arguments": "{"}},
            ],
        },
        {"role": "tool", "content": "wet", "tool_call_id": "1"},
        {"role": "tool", "content": "cold", "tool_call_id": "2"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": "3", "type": "function", "function": {"name": "f", "arguments": {}}}
            ],
        },
    ]
    assert messages_of("Hi", None) == [{"role": "user", "content": "Hi"}]
    with pytest.raises(ValidationError, match="must be a string or a list"):
        messages_of({}, None)


async def test_openais_client() -> None:
    text = "<think>Hm.</think>Look. " + CALL
    async with RunningGateway(saying(text), reasoning_parser="deepseek_r1") as running:
        url = f"http://127.0.0.1:{running.port}/v1"
        client = openai.AsyncOpenAI(base_url=url, api_key="-", max_retries=0)
        whole = await client.responses.create(model="tgi", input="Rain?", tools=[TOOL])
        async with client.responses.stream(model="tgi", input="Rain?", tools=[TOOL]) as events:
            deltas = [
                event.delta async for event in events if event.type == "response.output_text.delta"
            ]
            streamed = await events.get_final_response()
        assert "".join(deltas) == "Look."
        for response in (whole, streamed):
            assert response.output_text == "Look."
            assert response.output[-1].arguments == '{"city": "Tokyo"}'
        # The output goes back as it came.
        history = [
            {"role": "user", "content": "Rain?"},
            *whole.output,
            {"type": "function_call_output", "call_id": whole.output[-1].call_id, "output": "wet"},
        ]
        await client.responses.create(model="tgi", input=history, tools=[TOOL])
        assert "<tool_response>\nwet\n</tool_response>" in running.router.requests[-1].text
