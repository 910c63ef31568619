"""/generate with vLLM's body: its defaults, rules, answers and streams."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest

from headgate import SamplingParams
from headgate.router.gateway.vllm_schemas import VllmGenerateRequest
from tests.unit import fake_router as fake
from tests.unit.fake_router import pb
from tests.unit.running_gateway import RunningGateway


def test_the_body_has_the_fields_of_sampling_params() -> None:
    names = {field.name for field in fields(SamplingParams)}
    assert set(VllmGenerateRequest.__struct_fields__) == names | {"prompt", "stream"}


async def test_the_answer_holds_prompt_and_text() -> None:
    async with RunningGateway() as running:
        response = await running.http.post("/generate", json={"prompt": "Kyoto,"})
        assert response.status_code == 200
        assert response.json() == {"text": ["Kyoto, Tokyo is big"]}
        assert response.headers["x-generated-tokens"] == "3"
        parameters = running.router.requests[0].parameters
        assert parameters.max_new_tokens == 16 and parameters.do_sample
        assert not parameters.logprobs and parameters.include_stop is False


async def test_tgi_bodies_are_tgis() -> None:
    async with RunningGateway() as running:
        for body in ({"inputs": "Hi"}, {"inputs": "Hi", "prompt": None}):
            answer = await running.http.post("/generate", json=body)
            assert answer.json() == {"generated_text": " Tokyo is big"}
        nothing = await running.http.post("/generate", json={"max_tokens": 3})
        assert nothing.status_code == 422 and "`inputs`" in nothing.json()["error"]


async def test_fields_travel() -> None:
    async with RunningGateway() as running:
        body = {
            "prompt": "Hi",
            "temperature": 0.5,
            "top_k": -1,
            "stop": "END",
            "bad_words": ["no way"],
            "stop_token_ids": [3, 3],
            "max_tokens": None,
            "min_tokens": 2,
            "seed": 9,
            "n": 1,
            "use_beam_search": False,
        }
        assert (await running.http.post("/generate", json=body)).status_code == 200
        parameters = running.router.requests[0].parameters
        assert parameters.temperature == 0.5 and parameters.seed == 9
        assert not parameters.HasField("top_k") and not parameters.HasField("max_new_tokens")
        assert list(parameters.bad_words) == ["no way"]
        assert list(parameters.stop) == ["END"] and list(parameters.stop_token_ids) == [3]
        assert parameters.min_new_tokens == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("top_p", 0),
        ("max_tokens", 0),
        ("presence_penalty", 2.5),
        ("repetition_penalty", 0),
        ("min_tokens", 17),
        ("length_penalty", 2.0),
        ("bad_words", [""]),
        ("logprob_token_ids", [1]),
        ("prompt", ["a", "b"]),
    ],
)
async def test_refusals_name_the_field(field: str, value: object) -> None:
    async with RunningGateway() as running:
        response = await running.http.post("/generate", json={"prompt": "Hi", field: value})
        assert response.status_code == 422
        assert response.json()["error_type"] == "validation"
        assert f"`{field}`" in response.json()["error"]
        assert not running.router.requests


async def test_what_has_no_effect_is_said() -> None:
    async with RunningGateway() as running:
        body = {"prompt": "Hi", "logprobs": 3, "wings": 2, "temperature": 0.001}
        response = await running.http.post("/generate", json=body)
        warnings = response.headers["x-headgate-warnings"]
        assert all(word in warnings for word in ("`logprobs`", "wings", "raised to 0.01"))


@pytest.mark.parametrize("nul", [False, True])
async def test_streams_are_the_whole_text_so_far(nul: bool) -> None:
    async with (
        RunningGateway(vllm_stream_nul=nul) as running,
        running.http.stream(
            "POST", "/generate", json={"prompt": 'Say "hi":\n', "stream": True}
        ) as response,
    ):
        delimiter = "\0" if nul else "\n"
        pieces = (await response.aread()).decode().split(delimiter)
        assert pieces.pop() == ""
        texts = [json.loads(piece)["text"] for piece in pieces]
        start = 'Say "hi":\n'
        assert texts == [[start + " Tokyo"], [start + " Tokyo is"], [start + " Tokyo is big"]]


async def test_a_stream_that_fails_says_so_and_refusals_have_their_status() -> None:
    async def broken(conversation: fake.Conversation, submit: pb.Submit) -> None:
        conversation.send(submit, fake.accepted())
        conversation.send(submit, fake.tokens(0, fake.token(1, "a"), text="a", offset=0))
        conversation.send(submit, fake.error("generation", 424, "it broke"))

    async with RunningGateway(broken) as running:
        body = {"prompt": "x", "stream": True}
        async with running.http.stream("POST", "/generate", json=body) as response:
            first, last, rest = (await response.aread()).split(b"\n")
        assert json.loads(first) == {"text": ["xa"]} and rest == b""
        assert json.loads(last) == {"error": "it broke", "error_type": "generation"}
        refused = await running.http.post("/generate", json={**body, "top_k": -2})
        assert refused.status_code == 422


async def test_idle_streams_are_kept_open_with_empty_pieces() -> None:
    async def slow(conversation: fake.Conversation, submit: pb.Submit) -> None:
        conversation.send(submit, fake.accepted())

    async with RunningGateway(slow, keep_alive_seconds=0.05) as running:
        body = {"prompt": "x", "stream": True}
        async with running.http.stream("POST", "/generate", json=body) as response:
            async for piece in response.aiter_raw():
                assert set(piece) == {10}
                break


async def test_several_answers_whole_and_streamed() -> None:
    async with RunningGateway() as running:
        body = {"prompt": "Hi", "n": 2, "temperature": 1.0, "logit_bias": {"5": 1.5}}
        whole = (await running.http.post("/generate", json=body)).json()
        assert whole == {"text": ["Hi Tokyo is big", "Hi Tokyo is"]}
        assert dict(running.router.requests[0].parameters.logit_bias) == {5: 1.5}
        response = await running.http.post("/generate", json={**body, "stream": True})
        objects = [json.loads(line) for line in response.text.splitlines() if line]
        assert objects[0] == {"text": ["Hi Tokyo", "Hi"]}
        assert objects[1] == {"text": ["Hi Tokyo", "Hi Tokyo"]}
        assert objects[-1] == whole
        refused = await running.http.post("/generate", json={**body, "n": 10**9})
        assert refused.status_code == 422 and "`n`" in refused.json()["error"]
