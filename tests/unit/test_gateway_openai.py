"""The /v1 routes: shapes, streams, parameters, refusals, and OpenAI's own client."""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any

import openai
import pytest

from tests.unit import fake_router as fake
from tests.unit.fake_router import pb
from tests.unit.running_gateway import RunningGateway

ASK = {"messages": [{"role": "user", "content": "Capital of Japan?"}]}
USAGE = {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}


async def test_chat() -> None:
    async with RunningGateway() as running:
        response = await running.http.post("/v1/chat/completions", json=ASK)
        assert response.status_code == 200
        body = response.json()
        assert body.pop("id").startswith("chatcmpl-")
        assert body.pop("created") > 1_700_000_000
        assert body == {
            "object": "chat.completion",
            "model": "model",
            "system_fingerprint": "0.1.0-native",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": " Tokyo is big"},
                    "logprobs": None,
                    "finish_reason": "length",
                }
            ],
            "usage": USAGE,
        }
        assert response.headers["x-prompt-tokens"] == "3"
        (request,) = running.router.requests
        assert request.text == "<|user|>Capital of Japan?<|end|>\n<|assistant|>"
        assert request.HasField("add_special_tokens") and not request.add_special_tokens
        assert request.parameters.do_sample and not request.parameters.logprobs
        assert request.parameters.HasField("logprobs")


async def test_chat_stream() -> None:
    async with RunningGateway() as running:
        events = await running.stream("/v1/chat/completions", {**ASK, "stream": True})
        assert events.pop() == "[DONE]"
        assert len({event["id"] for event in events}) == 1
        assert all(event["usage"] is None for event in events)
        assert all(event["object"] == "chat.completion.chunk" for event in events)
        choices = [event["choices"][0] for event in events]
        assert [choice["delta"] for choice in choices] == [
            {"role": "assistant", "content": text} for text in fake.WORDS
        ]
        assert [choice["finish_reason"] for choice in choices] == [None, None, "length"]
        assert all(choice["logprobs"] is None for choice in choices)


@pytest.mark.parametrize("include", [True, False])
async def test_chat_stream_usage(include: bool) -> None:
    async with RunningGateway() as running:
        body = {**ASK, "stream": True, "stream_options": {"include_usage": include}}
        events = await running.stream("/v1/chat/completions", body)
        assert events.pop() == "[DONE]"
        if include:
            last = events.pop()
            assert last["choices"] == [] and last["usage"] == USAGE
        assert len(events) == 3
        assert all(event["usage"] is None and len(event["choices"]) == 1 for event in events)


async def test_chat_logprobs() -> None:
    async with RunningGateway() as running:
        wish = {"logprobs": True, "top_logprobs": 2}
        body = (await running.http.post("/v1/chat/completions", json={**ASK, **wish})).json()
        content = body["choices"][0]["logprobs"]["content"]
        assert content[1] == {
            "token": " is",
            "logprob": -1.5,
            "bytes": [32, 105, 115],
            "top_logprobs": [
                {"token": " alt0", "logprob": -1.0, "bytes": list(b" alt0")},
                {"token": " alt1", "logprob": -2.0, "bytes": list(b" alt1")},
            ],
        }
        events = await running.stream("/v1/chat/completions", {**ASK, **wish, "stream": True})
        streamed = [event["choices"][0]["logprobs"]["content"] for event in events[:-1]]
        assert [entry for entries in streamed for entry in entries] == content


async def test_eos_is_stop_and_has_no_content() -> None:
    async def script(conversation: fake.Conversation, submit: pb.Submit) -> None:
        conversation.send(submit, fake.accepted())
        conversation.send(submit, fake.tokens(0, fake.token(5, "Hi"), text="Hi", offset=0))
        eos = fake.token(2, "</s>", special=True)
        conversation.send(
            submit,
            fake.tokens(1, eos, text="", offset=2),
            fake.finished("Hi", 2, pb.FINISH_REASON_EOS_TOKEN),
        )

    async with RunningGateway(script) as running:
        events = await running.stream("/v1/chat/completions", {**ASK, "stream": True})
        assert [event["choices"][0]["delta"]["content"] for event in events[:-1]] == ["Hi", ""]
        assert events[-2]["choices"][0]["finish_reason"] == "stop"


async def test_completions() -> None:
    async with RunningGateway() as running:
        body = {"model": "tgi", "prompt": "Hi", "temperature": 0, "max_tokens": 3}
        response = await running.http.post("/v1/completions", json=body)
        answer = response.json()
        assert answer.pop("id").startswith("cmpl-")
        answer.pop("created")
        choice = {"index": 0, "text": " Tokyo is big", "logprobs": None, "finish_reason": "length"}
        assert answer == {
            "object": "text_completion",
            "model": "model",
            "system_fingerprint": "0.1.0-native",
            "choices": [choice],
            "usage": USAGE,
        }
        assert "x-compute-time" not in response.headers
        assert response.headers["x-generated-tokens"] == "3"
        assert running.router.requests[0].parameters == pb.Parameters(
            do_sample=False, max_new_tokens=3, include_stop=False, logprobs=False
        )


async def test_completions_stream_has_an_event_for_each_token() -> None:
    async def script(conversation: fake.Conversation, submit: pb.Submit) -> None:
        conversation.send(submit, fake.accepted())
        half = fake.token(5, "")  # half of a character
        conversation.send(submit, fake.tokens(0, half, text="", offset=0))
        both = fake.token(6, "é"), fake.token(7, "x")  # two tokens of one step
        conversation.send(submit, fake.tokens(1, *both, text="éx", offset=0))
        conversation.send(
            submit, fake.tokens(3, fake.token(8, "!"), text="!", offset=2), fake.finished("éx!", 4)
        )

    async with RunningGateway(script) as running:
        body = {"prompt": "Hi", "stream": True, "stream_options": {"include_usage": True}}
        events = await running.stream("/v1/completions", body)
        assert events.pop() == "[DONE]"
        assert events.pop()["usage"]["completion_tokens"] == 4
        assert all(event["usage"] is None for event in events)
        choices = [event["choices"][0] for event in events]
        assert [choice["text"] for choice in choices] == ["", "", "éx", "!"]
        assert [choice["finish_reason"] for choice in choices] == [None, None, None, "length"]


async def test_several_prompts() -> None:
    async with RunningGateway() as running:
        body: dict[str, Any] = {"prompt": ["a", "b", "c", "d"]}
        answer = (await running.http.post("/v1/completions", json=body)).json()
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
        assert answer["usage"] == {
            "prompt_tokens": 12, "completion_tokens": 12, "total_tokens": 24,
        }  # fmt: skip
        events = await running.stream("/v1/completions", {**body, "stream": True})
        assert events.pop() == "[DONE]"
        for index in range(4):
            own = [event for event in events if event["choices"][0]["index"] == index]
            assert "".join(event["choices"][0]["text"] for event in own) == " Tokyo is big"
            assert own[-1]["usage"] == USAGE  # as TGI does where stream_options is absent
            assert all("usage" not in event for event in own[:-1])
        response = await running.http.post("/v1/completions", json={"prompt": ["a"] * 5})
        assert response.status_code == 422
        assert response.json()["error"]["param"] == "prompt"


async def test_token_ids_as_prompts() -> None:
    async with RunningGateway() as running:
        for prompt in ([1, 2, 3], [[1, 2, 3]]):
            response = await running.http.post("/v1/completions", json={"prompt": prompt})
            assert response.status_code == 200
            assert list(running.router.requests[-1].token_ids.ids) == [1, 2, 3]
        for wrong in ([], [[1], "a", 2], [1, "a"], [-1], [True], {}, None, [2**32]):
            response = await running.http.post("/v1/completions", json={"prompt": wrong})
            assert response.status_code == 422, wrong
            assert response.json()["error"]["param"].startswith("prompt")


async def test_completions_logprobs_and_echo() -> None:
    async with RunningGateway() as running:
        body = {"prompt": "Hi there", "logprobs": 1, "echo": True}
        (choice,) = (await running.http.post("/v1/completions", json=body)).json()["choices"]
        assert choice["text"] == "Hi there Tokyo is big"
        assert choice["logprobs"] == {
            "tokens": ["Hi", " there", " Tokyo", " is", " big"],
            "token_logprobs": [None, -3.25, -0.5, -1.5, -2.5],
            "top_logprobs": [
                None,
                {" there": -3.25},
                {" alt0": -1.0, " Tokyo": -0.5},
                {" alt0": -1.0, " is": -1.5},
                {" alt0": -1.0, " big": -2.5},
            ],
            "text_offset": [0, 2, 8, 14, 17],
        }
        body = {"prompt": "Hi there", "logprobs": 0, "stream": True}
        events = await running.stream("/v1/completions", body)
        assert [event["choices"][0]["logprobs"]["text_offset"] for event in events[:-1]] == [
            [0], [6], [9],
        ]  # fmt: skip
        events = await running.stream(
            "/v1/completions", {"prompt": "Hi there", "echo": True, "stream": True}
        )
        assert events[0]["choices"][0]["text"] == "Hi there Tokyo"
        body = {"prompt": [1, 2], "echo": True}
        (choice,) = (await running.http.post("/v1/completions", json=body)).json()["choices"]
        assert choice["text"] == "Hi there Tokyo is big"
        response = await running.http.post("/v1/completions", json={**body, "stream": True})
        assert response.json()["error"]["param"] == "echo"


async def test_alternatives_that_are_parts_of_characters() -> None:
    async def script(conversation: fake.Conversation, submit: pb.Submit) -> None:
        new = fake.token(5, "", -0.9)
        new.top.extend(fake.token(id_, "\ufffd", -0.3 * (id_ - 3)) for id_ in (4, 5, 6))
        conversation.send(submit, fake.accepted(), fake.tokens(0, new, text="", offset=0))
        conversation.send(submit, fake.finished("", 1))

    async with RunningGateway(script) as running:
        body = {"prompt": "Hi", "logprobs": 3}
        (choice,) = (await running.http.post("/v1/completions", json=body)).json()["choices"]
        assert choice["logprobs"]["top_logprobs"] == [{"\ufffd": -0.3}]


async def test_parameters_reach_the_router() -> None:
    given = {
        "temperature": 0.5, "top_p": 0.875, "top_k": 5, "min_p": 0.25, "typical_p": 0.5,
        "seed": 9, "repetition_penalty": 1.5, "frequency_penalty": 0.5, "presence_penalty": 0.25,
        "min_tokens": 2, "ignore_eos": True, "stop": "x", "stop_token_ids": [4],
        "skip_special_tokens": False, "include_stop_str_in_output": True, "top_n": 2, "n": 1,
        "best_of": 1, "logit_bias": {"5": -1.5}, "allowed_token_ids": [5, 6], "bad_words": ["no"],
        "user": "me",
    }  # fmt: skip
    async with RunningGateway() as running:
        expected = pb.Parameters(
            do_sample=True, temperature=0.5, top_p=0.875, top_k=5, min_p=0.25, typical_p=0.5,
            seed=9, repetition_penalty=1.5, frequency_penalty=0.5, presence_penalty=0.25,
            max_new_tokens=8, min_new_tokens=2, ignore_eos=True, stop=["x"], stop_token_ids=[4],
            skip_special_tokens=False, include_stop=True, logprobs=True, top_n_tokens=2, n=1,
            logit_bias={5: -1.5}, allowed_token_ids=[5, 6], bad_words=["no"],
        )  # fmt: skip
        chat = {**ASK, **given, "max_completion_tokens": 8, "response_format": {"type": "text"}}
        chat |= {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True}
        text = {"prompt": "Hi", **given, "max_tokens": 8, "suffix": "", "add_special_tokens": False}
        for path, body in (("/v1/chat/completions", chat), ("/v1/completions", text)):
            response = await running.http.post(path, json=body)
            assert response.status_code == 200, response.text
            assert "x-headgate-warnings" not in response.headers
            assert running.router.requests[-1].parameters == expected
            assert not running.router.requests[-1].add_special_tokens


async def test_temperature_zero_is_greedy_whatever_else_is_set() -> None:
    async with RunningGateway() as running:
        body = {**ASK, "temperature": 0, "top_p": 0.9, "top_k": 4, "seed": 1, "stop": []}
        await running.http.post("/v1/chat/completions", json=body)
        assert running.router.requests[0].parameters == pb.Parameters(
            do_sample=False, include_stop=False, logprobs=False
        )


async def test_off_values_of_vllm() -> None:
    async with RunningGateway() as running:
        for top_k in (0, -1):
            await running.http.post(
                "/v1/completions", json={"prompt": "Hi", "top_k": top_k, "seed": -1}
            )
            parameters = running.router.requests[-1].parameters
            assert not parameters.HasField("top_k") and not parameters.HasField("seed")


CHAT_REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"n": 129}, "n"),
    ({"n": 0}, "n"),
    ({"logit_bias": {"five": 1}}, "logit_bias"),
    ({"logit_bias": {"5" * 5000: 1}}, "logit_bias"),
    ({"grammar": {"type": "json"}}, "grammar"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tool_choice": "required"}, "tool_choice"),  # without tools
    ({"functions": [{}]}, "functions"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format"),
    ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
    ({"structured_outputs": {"regexp": "a"}}, "structured_outputs"),
    ({"structured_outputs": {"structural_tag": "[" * 9999}}, "structured_outputs"),
    ({"guided_choice": [1]}, "guided_choice[0]"),
    ({"guided_json": 5}, "guided_json"),
    ({"audio": {"voice": "x"}}, "audio"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"temperature": -1}, "temperature"),
    ({"top_k": -2}, "top_k"),
    ({"seed": -5}, "seed"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"content": "x"}]}, "messages[0].role"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0]",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
        "messages[0].content[0]",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "0"}]}]},
        "messages[0].tool_calls[0].function",
    ),
    (
        {"messages": [{"role": "assistant", "content": "", "function_call": {"name": "f"}}]},
        "messages[0].function_call",
    ),
]


async def test_refusals_name_the_field() -> None:
    async with RunningGateway() as running:
        for (more, field), stream in itertools.product(CHAT_REFUSALS, (False, True)):
            response = await running.http.post(
                "/v1/chat/completions", json={**ASK, **more, "stream": stream}
            )
            assert response.status_code == 422, more
            body = response.json()
            assert body["error_type"] == "validation"
            message = body["error"].pop("message")
            assert f"`{field.split('.')[0].split('[')[0]}" in message
            assert body["error"] == {
                "type": "invalid_request_error",
                "param": field,
                "code": "validation",
                "http_status_code": 422,
            }
        assert not running.router.requests


async def test_refusals_of_completions() -> None:
    async with RunningGateway() as running:
        for more, field in (
            ({"suffix": "x"}, "suffix"),
            ({"n": 1_000_000_000}, "n"),
            ({"response_format": {"type": "xml"}}, "response_format"),
            ({"logprobs": True}, "logprobs"),
            ({"max_tokens": -1}, "max_tokens"),
        ):
            response = await running.http.post("/v1/completions", json={"prompt": "Hi", **more})
            assert response.status_code == 422
            assert response.json()["error"]["param"] == field


TOO_LONG = "`inputs` tokens + `max_new_tokens` must be <= 9. Given: `x` and 9"


@pytest.mark.parametrize(
    ("path", "body", "names"),
    [
        ("/v1/chat/completions", ASK, ("messages", "max_tokens")),
        ("/v1/completions", {"prompt": "a"}, ("prompt", "max_tokens")),
        ("/v1/responses", {"input": "a"}, ("input", "max_output_tokens")),
        ("/generate", {"prompt": "a"}, ("prompt", "max_tokens")),
        ("/generate", {"inputs": "a"}, ("inputs", "max_new_tokens")),
        ("/invocations", {"prompt": "a"}, ("prompt", "max_tokens")),
    ],
)
async def test_refusals_by_the_router_have_the_routes_names_of_fields(
    path: str, body: dict[str, Any], names: tuple[str, str]
) -> None:
    async def script(conversation: fake.Conversation, submit: pb.Submit) -> None:
        given = {"field": "max_new_tokens", "context_length": 9}
        conversation.send(submit, fake.error("validation", 422, TOO_LONG, **given))

    text = f"`{names[0]}` tokens + `{names[1]}` must be <= 9. Given: `x` and 9"
    async with RunningGateway(script) as running:
        for stream in (False, True):
            response = await running.http.post(path, json={**body, "stream": stream})
            assert response.status_code == 422
            error = response.json()["error"]
            if path.startswith("/v1"):
                text_here = f"{text}. This model's maximum context length is 9 tokens."
                assert (error["message"], error["param"]) == (text_here, names[1])
                assert error["code"] == "context_length_exceeded"
            else:
                assert error == text


async def test_tools_with_choice_none_are_plain_chat() -> None:
    async with RunningGateway() as running:
        body = {
            **ASK,
            "tools": [{"type": "function", "function": {"name": "f"}}],
            "tool_choice": "none",
        }
        assert (await running.http.post("/v1/chat/completions", json=body)).status_code == 200


async def test_models_that_are_served() -> None:
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", ASK),
        ("/v1/completions", {"prompt": "a"}),
    ]
    models = [None, "", "tgi", "dummy", "model", "org/model"]
    async with RunningGateway() as running:
        for (path, body), model in itertools.product(bodies, models):
            response = await running.http.post(path, json={**body, "model": model})
            assert response.status_code == 200
            assert response.json()["model"] == "model"


async def test_other_models_are_not_found() -> None:
    async with RunningGateway() as running:
        response = await running.http.post("/v1/completions", json={"prompt": "a", "model": "gpt"})
        assert response.status_code == 404
        body = response.json()
        assert body["error_type"] == body["error"]["code"] == "model_not_found"
        assert body["error"]["param"] == "model"


async def test_model_routes() -> None:
    async with RunningGateway() as running:
        model = {"id": "model", "object": "model", "created": 0, "owned_by": "model"}
        listed = await running.http.get("/v1/models")
        assert listed.json() == {"object": "list", "data": [model]}
        assert (await running.http.get("/v1/models/org/model")).json() == model
        for other in ("other", ""):
            assert (await running.http.get(f"/v1/models/{other}")).status_code == 404


async def test_openais_own_client() -> None:
    async with RunningGateway(api_key="secret") as running:
        client = openai.AsyncOpenAI(
            base_url=f"http://127.0.0.1:{running.port}/v1", api_key="secret", max_retries=0
        )
        async with client:
            chat = await client.chat.completions.create(model="tgi", messages=ASK["messages"])  # type: ignore[call-overload]
            assert chat.choices[0].message.content == " Tokyo is big"
            stream = await client.completions.create(model="tgi", prompt=["a", "b"], stream=True)
            texts = ["", ""]
            async for chunk in stream:
                for choice in chunk.choices:
                    texts[choice.index] += choice.text
            assert texts == [" Tokyo is big"] * 2
            assert [model.id async for model in client.models.list()] == ["model"]
            with pytest.raises(openai.UnprocessableEntityError) as refused:
                await client.completions.create(model="tgi", prompt="a", n=200)
            assert refused.value.param == "n"
            with pytest.raises(openai.NotFoundError):
                await client.completions.create(model="gpt", prompt="a")


async def test_errors_after_the_start_are_events() -> None:
    async def script(conversation: fake.Conversation, submit: pb.Submit) -> None:
        conversation.send(submit, fake.accepted())
        conversation.send(submit, fake.tokens(0, fake.token(5, "Hi"), text="Hi", offset=0))
        if submit.key % 2:  # the first of two
            await asyncio.sleep(0.1)
            conversation.send(submit, fake.error("generation", 424, "broken"))

    async with RunningGateway(script) as running:
        events = await running.stream("/v1/completions", {"prompt": ["a", "b"], "stream": True})
        assert events.pop() == "[DONE]"
        last = events.pop()
        assert last["error_type"] == "generation"
        assert last["error"]["http_status_code"] == 424
        assert last["error"]["message"] == "broken"
        assert json.dumps(events).count("Hi") >= 1
        native = await running.stream("/generate_stream", {"inputs": "Hi"})
        assert native[-1] == {"error": "broken", "error_type": "generation"}
