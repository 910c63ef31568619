"""/invocations and /vertex, routes that Vertex AI names, /chat_tokenize, and cancelling by id."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.unit import fake_router as fake
from tests.unit.fake_router import pb
from tests.unit.running_gateway import RunningGateway, until

MESSAGES = [{"role": "user", "content": "Hi"}]


async def test_invocations_takes_three_bodies() -> None:
    async with RunningGateway() as running:
        native = await running.http.post("/invocations", json={"inputs": "Hi"})
        assert native.json() == [{"generated_text": "Hi Tokyo is big"}]
        chat = await running.http.post("/invocations", json={"messages": MESSAGES})
        assert chat.json()["choices"][0]["message"]["content"] == " Tokyo is big"
        text = await running.http.post("/invocations", json={"prompt": "Hi"})
        assert text.json()["object"] == "text_completion"
        for body in ({"inputs": "Hi"}, {"messages": MESSAGES}, {"prompt": "Hi"}):
            events = await running.stream("/invocations", {**body, "stream": True})
            assert len(events) >= 3
        nothing = await running.http.post("/invocations", json={})
        assert nothing.status_code == 422 and "`inputs`" in nothing.json()["error"]


async def test_vertex_answers_instances_in_order() -> None:
    async with RunningGateway() as running:
        instances = [
            {"inputs": "Hi", "parameters": {"max_new_tokens": 3, "seed": 2, "top_k": 4}},
            {"messages": MESSAGES, "max_tokens": 5},
        ]
        response = await running.http.post("/vertex", json={"instances": instances})
        assert response.json() == {"predictions": [" Tokyo is big", " Tokyo is big"]}
        assert response.headers["x-generated-tokens"] == "6"
        first, second = running.router.requests
        assert (first.text, first.parameters.top_k, first.parameters.seed) == ("Hi", 4, 2)
        assert second.text.endswith("<|assistant|>") and not second.add_special_tokens
        assert first.call_id == second.call_id and first.request_id != second.request_id


async def test_vertex_gives_the_best_answer_to_an_instance() -> None:
    async with RunningGateway() as running:
        several = {"best_of": 2, "do_sample": True}
        instances = [{"inputs": "Hi", "parameters": several}, {"messages": MESSAGES, "n": 3}]
        response = await running.http.post("/vertex", json={"instances": instances})
        assert response.json() == {"predictions": [" Tokyo is big", " Tokyo is big"]}


@pytest.mark.parametrize(
    ("instances", "field"),
    [
        ([], "instances"),
        ([{"inputs": "Hi"}] * 129, "instances"),
        ([{"inputs": "Hi"}, {"inputs": 3}], "instances[1].inputs"),
        ([{"text": "Hi"}], "instances[0].inputs"),
        (["Hi"], "instances[0]"),
        ([{"messages": [{"role": "user"}]}], "messages[0].content"),
    ],
)
async def test_vertex_names_what_is_wrong(instances: list[Any], field: str) -> None:
    async with RunningGateway() as running:
        response = await running.http.post("/vertex", json={"instances": instances})
        assert response.status_code == 422
        assert f"`{field}`" in response.json()["error"]
        assert not running.router.requests


async def test_unknown_fields_of_an_instance_are_told() -> None:
    async with RunningGateway() as running:
        body = {"instances": [{"inputs": "Hi", "wings": 2}]}
        response = await running.http.post("/vertex", json=body)
        assert "instances[0].wings" in response.headers["x-headgate-warnings"]


async def test_vertex_ai_names_its_routes() -> None:
    async with RunningGateway(predict_route="/predict", health_route="/alive") as running:
        body = {"instances": [{"inputs": "Hi"}]}
        assert (await running.http.post("/predict", json=body)).json() == {
            "predictions": [" Tokyo is big"]
        }
        assert (await running.http.get("/alive")).status_code == 200
    async with RunningGateway(predict_route="/vertex", health_route="/health") as running:
        assert (await running.http.post("/vertex", json=body)).status_code == 200


async def test_chat_tokenize() -> None:
    async with RunningGateway() as running:
        response = await running.http.post("/chat_tokenize", json={"messages": MESSAGES})
        answer = response.json()
        assert answer["templated_text"] == "<|user|>Hi<|end|>\n<|assistant|>"
        assert [set(token) for token in answer["tokenize_response"]] == [
            {"id", "text", "start", "stop"}
        ]
        empty = await running.http.post("/chat_tokenize", json={"messages": []})
        assert empty.status_code == 422


async def never(conversation: fake.Conversation, submit: pb.Submit) -> None:
    conversation.send(submit, fake.accepted())
    conversation.send(submit, fake.tokens(0, fake.token(1, "a"), text="a", offset=0))


async def test_cancel_ends_whole_answers_and_streams() -> None:
    async with RunningGateway(never) as running:
        named = {"x-request-id": "mine / 1"}
        whole = asyncio.create_task(
            running.http.post("/generate", json={"inputs": "Hi"}, headers=named)
        )
        several = asyncio.create_task(
            running.http.post("/v1/completions", json={"prompt": ["a", "b"]}, headers=named)
        )
        async with running.http.stream(
            "POST", "/generate_stream", json={"inputs": "Hi"}, headers=named
        ) as stream:
            await until(lambda: len(running.router.submits) == 4)
            answer = await running.http.post("/cancel", json={"request_id": "mine / 1"})
            assert (answer.status_code, answer.json()) == (200, {"cancelled": 4})
            last = (await stream.aread()).decode().strip().split("\n\n")[-1]
        assert last == ('data: {"error":"The request was cancelled","error_type":"cancelled"}')
        for response in (await whole, await several):
            assert response.status_code == 499
            assert response.json()["error_type"] == "cancelled"


async def test_cancel_of_nothing() -> None:
    async with RunningGateway() as running:
        unknown = await running.http.post("/cancel", json={"request_id": "x"})
        assert unknown.status_code == 404 and "`x`" in unknown.json()["error"]
        for body in ({}, {"request_id": ""}, {"request_id": 3}):
            assert (await running.http.post("/cancel", json=body)).status_code == 422


async def test_the_new_posts_want_the_key() -> None:
    async with RunningGateway(api_key="k", predict_route="/predict") as running:
        for path in ("/invocations", "/vertex", "/chat_tokenize", "/cancel", "/predict"):
            assert (await running.http.post(path, json={})).status_code == 401
