"""TGI's routes: shapes, streams, headers, defaults."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from tests.unit import fake_router as fake
from tests.unit.fake_router import pb
from tests.unit.running_gateway import RunningGateway

TOKENS = [
    {"id": 11, "text": " Tokyo", "logprob": -0.5, "special": False},
    {"id": 12, "text": " is", "logprob": -1.5, "special": False},
    {"id": 13, "text": " big", "logprob": -2.5, "special": False},
]


async def test_generate_answers_the_text_alone() -> None:
    async with RunningGateway(compute_type="1-cpu") as running:
        response = await running.http.post("/generate", json={"inputs": "Hi there"})
        assert response.status_code == 200
        assert response.json() == {"generated_text": " Tokyo is big"}
        headers = response.headers
        assert headers["x-compute-type"] == "1-cpu"
        assert headers["x-compute-characters"] == "12"
        assert headers["x-validation-time"] == "1"
        assert headers["x-queue-time"] == "2"
        assert headers["x-inference-time"] == "30"
        assert headers["x-time-per-token"] == "10"
        assert headers["x-prompt-tokens"] == "3"
        assert headers["x-generated-tokens"] == "3"
        assert int(headers["x-total-time"]) >= 0
        assert float(headers["x-compute-time"]) > 0
        assert "x-headgate-warnings" not in headers


async def test_generate_with_details() -> None:
    async with RunningGateway() as running:
        body = {"inputs": "Hi", "parameters": {"details": True, "do_sample": True}}
        details = (await running.http.post("/generate", json=body)).json()["details"]
        assert details == {
            "finish_reason": "length",
            "generated_tokens": 3,
            "seed": 7,
            "prefill": [],
            "tokens": TOKENS,
        }


async def test_prefill_and_alternatives() -> None:
    async with RunningGateway() as running:
        parameters = {"decoder_input_details": True, "top_n_tokens": 2}
        response = await running.http.post(
            "/generate", json={"inputs": "Hi", "parameters": parameters}
        )
        details = response.json()["details"]
        assert details["prefill"] == [
            {"id": 1, "text": "Hi", "logprob": None},
            {"id": 2, "text": " there", "logprob": -3.25},
        ]
        assert details["seed"] is None
        assert [len(place) for place in details["top_tokens"]] == [2, 2, 2]
        assert details["top_tokens"][0][1] == {
            "id": 101, "text": " alt1", "logprob": -2.0, "special": False,
        }  # fmt: skip
        assert running.router.requests[0].parameters.prompt_logprobs


async def test_root_answers_a_list_with_the_prompt() -> None:
    async with RunningGateway() as running:
        answer = await running.http.post("/", json={"inputs": "Hi"})
        assert answer.json() == [{"generated_text": "Hi Tokyo is big"}]
        body = {"inputs": "Hi", "parameters": {"return_full_text": False}, "stream": False}
        assert (await running.http.post("/", json=body)).json() == [
            {"generated_text": " Tokyo is big"}
        ]
        events = await running.stream("/", {"inputs": "Hi", "stream": True})
        assert events[-1]["generated_text"] == "Hi Tokyo is big"


async def test_stream_has_one_event_per_token() -> None:
    async with RunningGateway() as running:
        body = {"inputs": "Hi", "parameters": {"details": True}}
        events = await running.stream("/generate_stream", body)
        assert events == [
            {"index": 1, "token": TOKENS[0], "generated_text": None, "details": None},
            {"index": 2, "token": TOKENS[1], "generated_text": None, "details": None},
            {
                "index": 3,
                "token": TOKENS[2],
                "generated_text": " Tokyo is big",
                "details": {
                    "finish_reason": "length",
                    "generated_tokens": 3,
                    "seed": None,
                    "input_length": 3,
                },
            },
        ]


async def test_stream_without_details_and_with_alternatives() -> None:
    async with RunningGateway() as running:
        body = {"inputs": "Hi", "parameters": {"top_n_tokens": 1}}
        events = await running.stream("/generate_stream", body)
        assert events[-1]["details"] is None
        assert all(len(event["top_tokens"]) == 1 for event in events)


async def test_stream_headers() -> None:
    async with (
        RunningGateway() as running,
        running.http.stream("POST", "/generate_stream", json={"inputs": "Hi"}) as response,
    ):
        await response.aread()
        assert response.headers["cache-control"] == "no-cache"
        assert response.headers["x-accel-buffering"] == "no"
        assert response.headers["x-compute-characters"] == "12"
        assert response.headers["x-request-id"]


async def test_the_last_token_is_cut_where_the_stop_text_ends() -> None:
    async def script(conversation: fake.Conversation, submit: pb.Submit) -> None:
        first, last = fake.token(5, "He"), fake.token(6, "ather")
        conversation.send(submit, fake.accepted())
        conversation.send(submit, fake.tokens(0, first, text="He", offset=0))
        conversation.send(
            submit,
            fake.tokens(1, last, text="athe", offset=2),
            fake.finished("Heathe", 2, pb.FINISH_REASON_STOP_SEQUENCE),
        )

    async with RunningGateway(script) as running:
        body = {"inputs": "Hi", "parameters": {"details": True, "stop": ["the"]}}
        events = await running.stream("/generate_stream", body)
        answer = (await running.http.post("/generate", json=body)).json()
        for shown in ([event["token"] for event in events], answer["details"]["tokens"]):
            assert [token["text"] for token in shown] == ["He", "athe"]


async def test_an_end_that_comes_alone_closes_the_stream() -> None:
    async def script(conversation: fake.Conversation, submit: pb.Submit) -> None:
        conversation.send(submit, fake.accepted())
        conversation.send(submit, fake.tokens(0, fake.token(5, "a"), text="a", offset=0))
        conversation.send(submit, fake.finished("a", 1, pb.FINISH_REASON_EOS_TOKEN))

    async with RunningGateway(script) as running:
        first, last = await running.stream("/generate_stream", {"inputs": "Hi"})
        assert first["token"]["text"] == "a" and first["generated_text"] is None
        assert last["index"] == 1 and last["token"]["text"] == ""
        assert last["generated_text"] == "a"


@pytest.mark.parametrize(
    ("body", "do_sample"),
    [
        ({"inputs": "Hi"}, True),  # TGI's quirk: no `parameters` at all samples
        ({"inputs": "Hi", "parameters": None}, True),
        ({"inputs": "Hi", "parameters": {}}, None),
        ({"inputs": "Hi", "parameters": {"do_sample": False}}, False),
        ({"inputs": "Hi", "parameters": {"do_sample": None}}, None),
    ],
)
async def test_sampling_default(body: dict[str, Any], do_sample: bool | None) -> None:
    async with RunningGateway() as running:
        assert (await running.http.post("/generate", json=body)).status_code == 200
        parameters = running.router.requests[0].parameters
        given = parameters.do_sample if parameters.HasField("do_sample") else None
        assert given == do_sample


async def test_all_parameters_reach_the_router() -> None:
    parameters = {
        "best_of": 1, "temperature": 0.5, "repetition_penalty": 1.25, "frequency_penalty": 0.5,
        "top_k": 10, "top_p": 0.875, "typical_p": 0.75, "do_sample": True, "max_new_tokens": 10,
        "return_full_text": False, "stop": ["x", "y"], "truncate": 5, "watermark": False,
        "details": False, "decoder_input_details": False, "seed": 2**64 - 1, "top_n_tokens": 2,
        "grammar": None, "adapter_id": "", "min_p": 0.25, "presence_penalty": -1.5,
        "min_new_tokens": 2, "ignore_eos_token": True, "stop_token_ids": [3],
    }  # fmt: skip
    async with RunningGateway() as running:
        response = await running.http.post(
            "/generate",
            json={"inputs": "Hi", "parameters": parameters},
            headers={"x-request-id": "mine"},
        )
        assert response.status_code == 200, response.text
        assert response.headers["x-request-id"] == "mine"
        assert "x-headgate-warnings" not in response.headers
        (request,) = running.router.requests
        assert request == pb.GenerateRequest(
            text="Hi",
            request_id="mine",
            parameters=pb.Parameters(
                do_sample=True, temperature=0.5, top_k=10, top_p=0.875, typical_p=0.75, min_p=0.25,
                repetition_penalty=1.25, frequency_penalty=0.5, presence_penalty=-1.5,
                seed=2**64 - 1, max_new_tokens=10, min_new_tokens=2, ignore_eos=True,
                stop=["x", "y"], stop_token_ids=[3], truncate=5, top_n_tokens=2,
                watermark=False,
            ),
        )  # fmt: skip


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"max_new_tokens": 0}, "max_new_tokens"),
    ({"grammar": {"type": "yaml", "value": "a"}}, "grammar"),
    ({"grammar": {"type": "json", "value": 5}}, "grammar"),
    ({"grammar": {"type": "json", "value": "{"}}, "grammar"),
    ({"grammar": {"type": "json", "value": '{"const": "\\ud800"}'}}, "grammar"),
    ({"grammar": {"type": "json_schema", "value": {"name": "x"}}}, "grammar"),
    ({"grammar": "a+"}, "grammar"),
    ({"top_k": 0}, "top_k"),
    ({"top_k": -1}, "top_k"),
    ({"seed": 2**64}, "seed"),
    ({"seed": -1}, "parameters.seed"),
    ({"max_new_tokens": -1}, "parameters.max_new_tokens"),
    ({"max_new_tokens": "many"}, "parameters.max_new_tokens"),
    ({"stop": "x"}, "parameters.stop"),
    ({"stop": [1]}, "parameters.stop[0]"),
    ({"temperature": "hot"}, "parameters.temperature"),
]


async def test_floats_that_are_whole_are_whole_numbers() -> None:
    async with RunningGateway() as running:
        parameters = {"max_new_tokens": 5.0, "stop_token_ids": [3.0], "temperature": 2}
        response = await running.http.post(
            "/generate", json={"inputs": "Hi", "parameters": parameters}
        )
        assert response.status_code == 200
        given = running.router.requests[0].parameters
        assert (given.max_new_tokens, list(given.stop_token_ids), given.temperature) == (5, [3], 2)
        for value in (5.5, 1e400, True, "5"):
            body = {"inputs": "Hi", "parameters": {"max_new_tokens": value}}
            content = json.dumps(body).replace("Infinity", "1e400")
            response = await running.http.post("/generate", content=content)
            assert response.status_code in (400, 422), value


async def test_what_is_not_served_is_named() -> None:
    async with RunningGateway() as running:
        paths = ("/generate", "/generate_stream", "/")
        for (parameters, field), path in itertools.product(REFUSALS, paths):
            response = await running.http.post(
                path, json={"inputs": "Hi", "parameters": parameters}
            )
            assert response.status_code == 422
            body = response.json()
            assert body["error_type"] == "validation"
            assert body["error"].startswith("Input validation error: ")
            assert f"`{field}`" in body["error"]
        assert not running.router.requests


async def test_best_of_is_ranked_by_the_router_and_shown_in_details() -> None:
    async with RunningGateway() as running:
        parameters = {"best_of": 2, "do_sample": True, "details": True}
        body = {"inputs": "Hi", "parameters": {**parameters, "decoder_input_details": True}}
        response = await running.http.post("/generate", json=body)
        sent = running.router.requests[0].parameters
        assert (sent.n, sent.best_of) == (2, 2)
        answer = response.json()
        details = answer["details"]
        assert answer["generated_text"] == " Tokyo is big"
        assert "best_of_sequences" not in details["best_of_sequences"][0]
        (other,) = details["best_of_sequences"]
        assert other["generated_text"] == " Tokyo is"
        assert other["generated_tokens"] == len(other["tokens"]) == 2
        assert other["prefill"] == details["prefill"] != []
        assert other["seed"] == details["seed"] == 7
        assert other.keys() == {*details, "generated_text"} - {"best_of_sequences"}
        assert response.headers["x-prompt-tokens"] == "3"
        assert response.headers["x-generated-tokens"] == "5"
        plain = await running.http.post(
            "/generate", json={"inputs": "Hi", "parameters": {"best_of": 2, "do_sample": True}}
        )
        assert plain.json() == {"generated_text": " Tokyo is big"}


@pytest.mark.parametrize(
    ("path", "parameters", "message"),
    [
        (
            "/generate",
            {"best_of": 2, "do_sample": True, "seed": 3},
            "`seed` must not be set when `best_of` > 1",
        ),
        (
            "/generate_stream",
            {"best_of": 2, "do_sample": True},
            "`best_of` != 1 is not supported when streaming tokens",
        ),
        (
            "/generate_stream",
            {"best_of": 0},
            "`best_of` != 1 is not supported when streaming tokens",
        ),
    ],
)
async def test_rules_of_best_of(path: str, parameters: dict[str, Any], message: str) -> None:
    async with RunningGateway() as running:
        response = await running.http.post(path, json={"inputs": "Hi", "parameters": parameters})
        assert response.status_code == 422
        assert response.json()["error"] == f"Input validation error: {message}"


async def test_best_of_0_is_as_1() -> None:
    async with RunningGateway() as running:
        body = {"inputs": "Hi", "parameters": {"best_of": 0}}
        assert (await running.http.post("/generate", json=body)).status_code == 200
        assert not running.router.requests[0].parameters.HasField("best_of")


async def test_prompt_details_are_refused_while_streaming() -> None:
    async with RunningGateway() as running:
        body = {"inputs": "Hi", "parameters": {"decoder_input_details": True}}
        response = await running.http.post("/generate_stream", json=body)
        assert response.status_code == 422
        assert "when streaming" in response.json()["error"]


async def test_tokenize() -> None:
    async with RunningGateway() as running:
        response = await running.http.post("/tokenize", json={"inputs": "Hi there"})
        assert response.json() == [
            {"id": 0, "text": "Hi", "start": 0, "stop": 2},
            {"id": 1, "text": "there", "start": 3, "stop": 8},
        ]
