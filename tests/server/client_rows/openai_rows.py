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
    try:
        chat(url, extra_body={"adapter_id": "nobody"})
    except openai.NotFoundError as error:
        assert error.code == "adapter_not_found"
    else:
        raise AssertionError("no NotFoundError")


def refused(ask: Any, field: str) -> None:
    try:
        ask()
    except openai.UnprocessableEntityError as error:
        assert error.param == field and f"`{field}`" in str(error), error
    else:
        raise AssertionError(f"{field} is taken")


def row_chat_fields_that_are_refused(url: str) -> None:
    for fields in (
        {"audio": {"voice": "alloy", "format": "wav"}}, {"modalities": ["audio"]},
        {"functions": [{"name": "f"}]}, {"function_call": {"name": "f"}}, {"store": True},
        {"web_search_options": {"a": 1}}, {"moderation": {"model": "m"}},
    ):  # fmt: skip
        refused(lambda given=fields: chat(url, extra_body=given), next(iter(fields)))


def row_other_fields_that_are_refused(url: str) -> None:
    refused(
        lambda: client(url).completions.create(model="tgi", prompt=CAPITAL, suffix="!"), "suffix"
    )
    refused(
        lambda: client(url).embeddings.create(model="tgi", input="a", dimensions=8), "dimensions"
    )
    for fields in (
        {"store": True}, {"background": True}, {"previous_response_id": "resp_1"},
        {"conversation": "conv_1"}, {"prompt": {"id": "pmpt_1"}}, {"moderation": {"model": "m"}},
        {"context_management": [{"type": "compaction"}]}, {"truncation": "auto"},
    ):  # fmt: skip
        refused(lambda given=fields: respond(url, extra_body=given), next(iter(fields)))


def warned(call: Any, **given: Any) -> str:
    """What the answer's header says of fields that were ignored."""
    return str(call(**given).headers.get("x-headgate-warnings", ""))


def row_chat_fields_without_effect(url: str) -> None:
    ask = client(url).chat.completions.with_raw_response.create
    given = {"model": "tgi", "messages": QUESTION, "max_tokens": 1}
    neutral = {
        "metadata": {"a": "b"}, "safety_identifier": "me", "prompt_cache_key": "k",
        "prompt_cache_retention": "24h", "prompt_cache_options": {}, "user": "me",
        "service_tier": "auto", "store": False,
    }  # fmt: skip
    assert warned(ask, **given, extra_body=neutral) == ""
    hints = {"reasoning_effort": "low", "verbosity": "low", "service_tier": "flex",
             "prediction": {"type": "content", "content": "x"}}  # fmt: skip
    text = warned(ask, **given, extra_body=hints)
    assert all(name in text for name in hints), text


def row_chat_template(url: str) -> None:
    """`chat_template_kwargs` are seen where the template reads them, `tool_prompt` anywhere."""
    plain = chat(url, max_tokens=1).usage.prompt_tokens
    extra = {"chat_template_kwargs": {"enable_thinking": False}}
    assert chat(url, max_tokens=1, extra_body=extra).usage.prompt_tokens == plain
    tools = [{"type": "function", "function": {"name": "f"}}]
    short = chat(url, max_tokens=1, tools=tools, extra_body={"tool_prompt": "Call."})
    usual = chat(url, max_tokens=1, tools=tools)
    assert plain < short.usage.prompt_tokens < usual.usage.prompt_tokens


def row_tool_choice(url: str) -> None:
    schema = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"],
              "additionalProperties": False}  # fmt: skip
    function = {"name": "light", "parameters": schema, "strict": True}
    given = {"tools": [{"type": "function", "function": function}], "max_tokens": 48}
    answer = chat(url, **given, tool_choice="required", parallel_tool_calls=False).choices[0]
    assert answer.finish_reason == "tool_calls"
    (call,) = answer.message.tool_calls
    assert call.function.name == "light"
    assert isinstance(json.loads(call.function.arguments)["on"], bool)


def respond(url: str, **more: Any) -> Any:
    given = {"model": "tgi", "input": QUESTION[0]["content"], "max_output_tokens": 4}
    return client(url).responses.create(**{**given, "temperature": 0, **more})


def row_responses(url: str) -> None:
    answer = respond(
        url, instructions="Be brief.", include=["message.output_text.logprobs"], top_logprobs=2,
        metadata={"a": "b"}, truncation="disabled", max_tool_calls=3, store=False, background=False,
        text={"format": {"type": "text"}}, tool_choice="none", parallel_tool_calls=False,
        extra_body={"chat_template_kwargs": {"x": 1}},
    )  # fmt: skip
    (place, *_) = answer.output[0].content[0].logprobs
    assert len(place.top_logprobs) == 2
    assert (answer.metadata, answer.max_tool_calls) == ({"a": "b"}, 3)
    assert answer.instructions == "Be brief."
    assert answer.usage.input_tokens != respond(url).usage.input_tokens
    try:
        respond(url, extra_body={"adapter_id": "nobody"})
    except openai.NotFoundError:
        return
    raise AssertionError("an adapter that is not there is taken")


def row_response_fields_without_effect(url: str) -> None:
    ask = client(url).responses.with_raw_response.create
    given = {"model": "tgi", "input": "Hi", "max_output_tokens": 1}
    neutral = {"safety_identifier": "me", "prompt_cache_key": "k", "prompt_cache_retention": "24h",
               "prompt_cache_options": {}, "user": "me", "service_tier": "auto"}  # fmt: skip
    assert warned(ask, **given, extra_body=neutral) == ""
    assert "reasoning" in warned(ask, **given, extra_body={"reasoning": {"effort": "low"}})


def row_embeddings(url: str) -> None:
    def embed(text: Any, **extra: Any) -> list[float]:
        create = client(url).embeddings.create
        answer = create(model="tgi", input=text, encoding_format="float", extra_body=extra)
        return list(answer.data[0].embedding)

    tokens = client(url).post("../tokenize", body={"inputs": CAPITAL}, cast_to=object)
    end = [token["id"] for token in tokens][-2:]
    assert embed(CAPITAL, truncate_prompt_tokens=2) == embed([end])
    assert embed(CAPITAL, add_special_tokens=False) == embed(CAPITAL, user="me")


def row_cancel(url: str) -> None:
    stream = chat(url, max_tokens=2000, stream=True, extra_headers={"x-request-id": "row"},
                  extra_body={"ignore_eos": True})  # fmt: skip
    next(iter(stream))
    body = {"request_id": "row"}
    assert client(url).post("../cancel", body=body, cast_to=object) == {"cancelled": 1}
    try:
        list(stream)
    except openai.APIError as error:
        assert "cancelled" in str(error)
        return
    raise AssertionError("the stream ended as if nothing had been")


def row_vertex(url: str) -> None:
    body = {"instances": [{"messages": QUESTION, "max_tokens": 32, "temperature": 0}]}
    answer = client(url).post("../vertex", body=body, cast_to=object)
    assert answer == {"predictions": [chat(url).choices[0].message.content]}
