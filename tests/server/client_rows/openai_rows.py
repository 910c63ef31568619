"""openai: what its clients ask of chat, completions and models (test_clients.py has more)."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai

QUESTION = [{"role": "user", "content": "What is the capital of Japan?"}]
CAPITAL = "The capital of France is"


def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0)


def chat(url: str, **more: Any) -> Any:
    given = {"model": "tgi", "messages": QUESTION, "temperature": 0, "max_tokens": 32}
    return client(url).chat.completions.create(**{**given, **more})


def row_n_choices(url: str) -> None:
    answers = [chat(url, temperature=1.5, n=3, seed=2, max_tokens=12) for _ in range(2)]
    texts = [[choice.message.content for choice in answer.choices] for answer in answers]
    assert texts[0] == texts[1] and len(set(texts[0])) > 1
    assert [choice.index for choice in answers[0].choices] == [0, 1, 2]


def row_stop_list_and_string(url: str) -> None:
    text = chat(url).choices[0].message.content
    for stop in (text[10:14], [text[10:14], "zzz"]):
        assert chat(url, stop=stop).choices[0].message.content == text[: text.index(text[10:14])]


def row_max_completion_tokens(url: str) -> None:
    answer = chat(url, max_tokens=None, max_completion_tokens=3)
    assert answer.usage.completion_tokens == 3 and answer.choices[0].finish_reason == "length"


def row_penalties_and_user(url: str) -> None:
    assert chat(url, presence_penalty=0.5, frequency_penalty=0.5, user="me").choices


def row_logit_bias(url: str) -> None:
    token = chat(url, max_tokens=1, logprobs=True, top_logprobs=1).choices[0].logprobs.content[0]
    tokens = client(url).post("../tokenize", body={"inputs": token.token}, cast_to=object)
    other = chat(url, max_tokens=1, logit_bias={str(tokens[0]["id"]): -100})
    assert other.choices[0].message.content != token.token


def row_json_object(url: str) -> None:
    answer = chat(url, max_tokens=64, response_format={"type": "json_object"})
    assert answer.choices[0].message.content.lstrip().startswith("{")


def row_parsed_json_schema(url: str) -> None:
    schema = {"type": "object", "properties": {"city": {"enum": ["Tokyo", "Oslo"]}},
              "required": ["city"], "additionalProperties": False}  # fmt: skip
    wanted = {"name": "city", "strict": True, "schema": schema}
    answer = chat(url, response_format={"type": "json_schema", "json_schema": wanted})
    assert json.loads(answer.choices[0].message.content)["city"] in ("Tokyo", "Oslo")


def row_vllms_extras(url: str) -> None:
    extra = {
        "top_k": 1, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 4, "ignore_eos": True,
        "stop_token_ids": [0], "skip_special_tokens": False, "include_stop_str_in_output": True,
    }  # fmt: skip
    assert chat(url, temperature=1, max_tokens=8, extra_body=extra).usage.completion_tokens >= 4


def row_completion_echo_and_logprobs(url: str) -> None:
    answer = client(url).completions.create(
        model="tgi", prompt=CAPITAL, temperature=0, max_tokens=4, echo=True, logprobs=2
    )
    choice = answer.choices[0]
    assert choice.text.startswith(CAPITAL)
    assert len(choice.logprobs.tokens) == 5 + 4 and choice.logprobs.token_logprobs[0] is None


def row_completion_best_of(url: str) -> None:
    answer = client(url).completions.create(
        model="tgi", prompt=CAPITAL, max_tokens=4, n=1, best_of=2, seed=1
    )
    assert len(answer.choices) == 1


def row_async_stream(url: str) -> None:
    async def ask() -> str:
        asking = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-")
        stream = await asking.chat.completions.create(
            model="tgi", messages=QUESTION, temperature=0, max_tokens=32, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(ask()) == chat(url).choices[0].message.content


def row_raw_response_and_request_id(url: str) -> None:
    raw = client(url).chat.completions.with_raw_response.create(
        model="tgi", messages=QUESTION, max_tokens=2, extra_headers={"x-request-id": "mine"}
    )
    assert raw.headers["x-request-id"] == "mine" and raw.parse().choices


def row_models(url: str) -> None:
    (model,) = client(url).models.list().data
    assert client(url).models.retrieve(model.id).id == model.id


def row_errors(url: str) -> None:
    for change, kind in (
        ({"model": "nobody"}, openai.NotFoundError),
        ({"max_tokens": 10**7}, openai.UnprocessableEntityError),
    ):
        for stream in (False, True):
            try:
                chat(url, **change, stream=stream)
            except kind as error:
                assert error.body["message"]
                continue
            raise AssertionError(f"no {kind.__name__}")
