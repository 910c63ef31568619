"""docs/api.md's table of OpenAI's fields: all that the `openai` package knows, as they behave."""

from __future__ import annotations

import re
from typing import Any

import pytest
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

from tests.unit import fake_router as fake
from tests.unit.fake_router import pb
from tests.unit.running_gateway import RunningGateway
from tests.unit.test_gateway_docs import section
from tests.unit.test_gateway_embeddings import embed

TYPES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "chat": (
        chat_create_params.CompletionCreateParamsBase,
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "Hi"}]},
    ),
    "completions": (
        completion_create_params.CompletionCreateParamsBase,
        "/v1/completions",
        {"prompt": "Hi"},
    ),
    "responses": (
        response_create_params.ResponseCreateParamsBase,
        "/v1/responses",
        {"input": "Hi"},
    ),
    "embeddings": (
        embedding_create_params.EmbeddingCreateParams,
        "/v1/embeddings",
        {"input": "Hi"},
    ),
}
WORKS, REFUSED, WARNED, NEUTRAL = "works", "refused", "warned", "neutral"
# A value that asks for something, by field; what is missing here is a string.
VALUES: dict[str, Any] = {
    "model": "tgi", "temperature": 0.5, "top_p": 0.5, "frequency_penalty": 0.5,
    "presence_penalty": 0.5, "seed": 3, "max_tokens": 3, "n": 1, "logprobs": True,
    "stream": False, "stream_options": {}, "top_logprobs": 2, "logit_bias": {"5": 1},
    "messages": [{"role": "user", "content": "Hi"}], "max_completion_tokens": 3,
    "response_format": {"type": "json_object"}, "tool_choice": "none", "parallel_tool_calls": False,
    "tools": [], "functions": [{}], "function_call": {"name": "x"}, "audio": {"voice": "x"},
    "modalities": ["audio"], "web_search_options": {"user_location": {}}, "store": True,
    "moderation": {"model": "x"}, "prediction": {"type": "content", "content": "x"},
    "service_tier": "flex", "metadata": {"a": "b"}, "prompt_cache_options": {"mode": "implicit"},
    "best_of": 1, "echo": True, "max_output_tokens": 3, "text": {"format": {"type": "text"}},
    "include": ["message.output_text.logprobs"], "reasoning": {"effort": "low"},
    "max_tool_calls": 3, "truncation": "auto", "background": True, "background_options": {"a": 1},
    "context_management": [{"type": "compaction"}], "access_programs": {"cyber": "standard"},
    "image": {"context_compression": "auto"}, "encoding_format": "base64", "dimensions": 3,
}  # fmt: skip


def table() -> dict[str, dict[str, str]]:
    """What the page says, by route and field."""
    said: dict[str, dict[str, str]] = {name: {} for name in TYPES}
    rows = re.findall(r"^\| ([^|]*`[^|]*) \|(.*)\|$", section("OpenAI's fields"), re.MULTILINE)
    for names, cells in rows:
        fields = re.findall(r"`([^`]+)`", names)
        for route, cell in zip(TYPES, cells.split("|"), strict=True):
            words = [word.strip() for word in cell.split(",")]
            for place, field in enumerate(fields):
                # One word for all of the row's fields, or one for each.
                own = words[place] if len(words) == len(fields) > 1 else cell.strip()
                if own != "-":
                    said[route][field] = own
    return said


TABLE = table()


@pytest.mark.parametrize("route", TYPES)
def test_the_table_has_every_field(route: str) -> None:
    fields = set(TYPES[route][0].__annotations__)
    if route != "embeddings":
        fields.add("stream")  # in a type of its own
    assert set(TABLE[route]) == fields


@pytest.mark.parametrize("route", TYPES)
async def test_fields_do_what_the_table_says(route: str) -> None:
    _, path, body = TYPES[route]

    async def script(conversation: fake.Conversation, submit: pb.Submit) -> None:
        answer = embed if submit.request.HasField("embedding") else fake.answer
        await answer(conversation, submit)

    async with RunningGateway(script) as running:
        for field, said in TABLE[route].items():
            value = VALUES.get(field, "x")
            if route == "completions" and field == "logprobs":
                value = 2
            extra = {"logprobs": True} if (route, field) == ("chat", "top_logprobs") else {}
            if (route, field) in (("completions", "prompt"), ("responses", "input")):
                value = "Hi"
            response = await running.http.post(path, json={**body, **extra, field: value})
            warnings = response.headers.get("x-headgate-warnings", "")
            if said == REFUSED:
                assert response.status_code == 422, field
                assert response.json()["error"]["param"].split(".")[0] == field
                continue
            assert response.status_code == 200, (field, response.text)
            # This template reads no variables, so the wishes for it are warned of.
            warned = said == WARNED or WARNED in said
            assert (field in warnings) == warned, (field, warnings)


async def test_wishes_for_the_template_reach_it() -> None:
    async with RunningGateway() as running:
        info = running.gateway.services.known_info()
        info.chat_template = "{{ reasoning_effort }} {{ verbosity }} {{ messages[0].content }}"
        chat = {**TYPES["chat"][2], "reasoning_effort": "low", "verbosity": "high"}
        response = await running.http.post("/v1/chat/completions", json=chat)
        assert "x-headgate-warnings" not in response.headers
        assert running.router.requests[-1].text == "low high Hi"
        body = {"input": "Hi", "reasoning": {"effort": "low"}, "text": {"verbosity": "high"}}
        response = await running.http.post("/v1/responses", json=body)
        assert "x-headgate-warnings" not in response.headers
        assert running.router.requests[-1].text == "low high Hi"
        body["reasoning"] = {"effort": "low", "summary": "auto"}
        response = await running.http.post("/v1/responses", json=body)
        assert "reasoning.summary" in response.headers["x-headgate-warnings"]
    async with RunningGateway(strict=True) as running:
        for field, value in (("service_tier", "flex"), ("verbosity", "low")):
            body = {**TYPES["chat"][2], field: value}
            response = await running.http.post("/v1/chat/completions", json=body)
            assert response.json()["error"]["param"] == field
