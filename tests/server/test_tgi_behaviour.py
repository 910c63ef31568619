"""What TGI's own tests assert of every model it serves, on the embedded one, on 1 and 2 shards.

Texts are this model's. Where tokens must be exact, test_answers.py holds the same requests against
Transformers; here it is shape, repeatability and what must not make a difference.
test_tgi_parts.py has what TGI's unit tests asserted.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.checkpoints import make_checkpoint
from tests.server.live_server import LiveServer, launched

PROMPT = "What is deep learning?"
QUESTION = [{"role": "user", "content": "What is the capital of Japan?"}]
ALL = {
    "max_new_tokens": 10,
    "repetition_penalty": 1.2,
    "return_full_text": True,
    "stop": ["test"],
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 10,
    "truncate": 5,
    "typical_p": 0.9,
    "watermark": True,
    "seed": 0,
}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 2},
        "home": {
            "type": "object",
            "properties": {"town": {"enum": ["Rome", "Oslo"]}},
            "required": ["town"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "tags", "home"],
    "additionalProperties": False,
}


@pytest.fixture(params=["server", "server_2_shards"])
def shards(request: pytest.FixtureRequest) -> LiveServer:
    """The embedded model on one shard, and on two."""
    live: LiveServer = request.getfixturevalue(request.param)
    return live


@pytest.fixture
def client(shards: LiveServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{shards.url}/v1", api_key="-", max_retries=0)


def at_once(ask: Callable[[Any], Any], things: Sequence[Any]) -> list[Any]:
    with ThreadPoolExecutor(len(things)) as pool:
        return list(pool.map(ask, things))


# ------------------------------------------------------------- the standard trio


def test_simple(shards: LiveServer) -> None:
    answer = shards.generate(PROMPT, max_new_tokens=10, decoder_input_details=True)
    details = answer["details"]
    assert details["generated_tokens"] == len(details["tokens"]) == 10
    assert (details["finish_reason"], details["seed"]) == ("length", None)
    assert answer["generated_text"] == "".join(token["text"] for token in details["tokens"])
    assert "".join(token["text"] for token in details["prefill"]) == PROMPT
    assert [token["logprob"] is None for token in details["prefill"]] == [True] + [False] * (
        len(details["prefill"]) - 1
    )
    events = list(shards.stream(PROMPT, max_new_tokens=10))
    assert [event["token"] for event in events] == details["tokens"]
    assert events[-1]["generated_text"] == answer["generated_text"]


def test_all_parameters(shards: LiveServer) -> None:
    answer = shards.generate(PROMPT, **ALL)
    details = answer["details"]
    assert answer["generated_text"].startswith(PROMPT)
    assert details["seed"] == 0
    assert details["generated_tokens"] == 10 or details["finish_reason"] == "stop_sequence"
    assert shards.generate(PROMPT, **ALL) == answer
    # Only the last five tokens of the prompt count, and the watermark does make a difference.
    other = shards.generate("And now:\n" + PROMPT, **{**ALL, "return_full_text": False})
    assert PROMPT + other["generated_text"] == answer["generated_text"]
    assert shards.generate(PROMPT, **{**ALL, "watermark": False}) != answer


def test_load(shards: LiveServer) -> None:
    alone = shards.generate(PROMPT, max_new_tokens=10)
    crowd = at_once(lambda _: shards.generate(PROMPT, max_new_tokens=10), range(4))
    assert crowd == [alone] * 4


def test_sampling_with_a_seed_is_reproducible(shards: LiveServer) -> None:
    first = shards.generate(PROMPT, max_new_tokens=10, top_p=0.9, seed=0)
    again = at_once(
        lambda _: shards.generate(PROMPT, max_new_tokens=10, top_p=0.9, seed=0), range(4)
    )
    assert again == [first] * 4 and first["details"]["seed"] == 0


# ------------------------------------------------------------------ prefix cache


def test_prompts_that_share_beginnings_in_any_order(shards: LiveServer) -> None:
    stories = ["The lighthouse keeper wrote a letter. " * 8, "List of rivers of Europe. " * 8]
    prompts = [f"{story}Number {index}:" for story in stories for index in range(6)]
    alone = {prompt: shards.token_ids(prompt, max_new_tokens=6) for prompt in prompts}
    shuffled = random.Random(1).sample(prompts, len(prompts))
    crowd = at_once(lambda prompt: shards.token_ids(prompt, max_new_tokens=6), shuffled)
    assert crowd == [alone[prompt] for prompt in shuffled]


# ------------------------------------------------------------------- completions


PROMPTS = ["What is Deep Learning?", "Is water wet?", "What is the capital of France?", "def mai"]


def test_completion_prompts(shards: LiveServer, client: openai.OpenAI) -> None:
    def complete(prompt: Any, **more: Any) -> Any:
        return client.completions.create(
            model="tgi", prompt=prompt, temperature=0, max_tokens=10, **more
        )

    alone = [complete(prompt).choices[0].text for prompt in PROMPTS]
    native = [shards.generate(prompt, max_new_tokens=10) for prompt in PROMPTS]
    assert alone == [answer["generated_text"] for answer in native]
    many = complete(PROMPTS)
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in many.choices] == alone
    assert many.usage.completion_tokens == sum(a["details"]["generated_tokens"] for a in native)
    texts, with_usage = [""] * 4, set()
    for chunk in complete(PROMPTS, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        assert bool(chunk.usage) == bool(choice.finish_reason)
        with_usage |= {choice.index} if chunk.usage else set()
    assert texts == alone and with_usage == {0, 1, 2, 3}
    chunks = list(complete(PROMPTS[0], stream=True, stream_options={"include_usage": True}))
    assert [bool(chunk.usage) for chunk in chunks] == [not chunk.choices for chunk in chunks]
    assert sum(bool(chunk.usage) for chunk in chunks) == 1


def test_usage_of_chat_streams(client: openai.OpenAI) -> None:
    def chunks(**more: Any) -> list[Any]:
        stream = client.chat.completions.create(
            model="tgi", messages=QUESTION, temperature=0, max_tokens=30, stream=True, **more
        )
        return list(stream)

    for options in (None, {"include_usage": False}):
        plain = chunks(stream_options=options) if options else chunks()
        assert not any(chunk.usage for chunk in plain)
        assert all(len(chunk.choices) == 1 for chunk in plain)
        last = plain[-1].choices[0]
        assert (last.delta.content, last.finish_reason) == ("", "stop")
    counted = chunks(stream_options={"include_usage": True})
    assert [bool(chunk.usage) for chunk in counted] == [False] * (len(counted) - 1) + [True]
    assert counted[-1].choices == [] and len(counted) == len(plain) + 1
    assert counted[-1].usage.completion_tokens == len(plain)


# -------------------------------------------------------------------------- chat


def test_chat_with_a_seed(client: openai.OpenAI) -> None:
    def ask(**more: Any) -> str:
        answer = client.chat.completions.create(
            model="tgi", messages=QUESTION, max_tokens=20, seed=1, **more
        )
        return str(answer.choices[0].message.content)

    assert ask() == ask(temperature=1) == ask(top_p=1)


def test_the_last_assistant_message_is_continued(client: openai.OpenAI) -> None:
    begun = "The capital of Japan is the city of"
    answer = client.chat.completions.create(
        model="tgi",
        messages=[*QUESTION, {"role": "assistant", "content": begun}],
        temperature=0,
        max_tokens=3,
    )
    text = answer.choices[0].message.content
    assert text.startswith(" Tokyo"), text


def test_images_are_text_or_refused(shards: LiveServer) -> None:
    address = "http://127.0.0.1:9/cow.png"
    answer = shards.generate(f"![]({address})What is in this image?", max_new_tokens=2)
    assert answer["details"]["generated_tokens"] == 2
    part = {"type": "image_url", "image_url": {"url": address}}
    body = {"messages": [{"role": "user", "content": [part]}]}
    response = shards.post("/v1/chat/completions", body)
    assert response.status_code == 422
    assert response.json()["error"]["param"] == "messages[0].content[0]"


# ------------------------------------------------------------------------- tools

WEATHER = {
    "name": "get_weather",
    "parameters": {
        "type": "object",
        "properties": {
            "location": {"enum": ["Brooklyn, NY", "Rome"]},
            "format": {"enum": ["celsius", "fahrenheit"]},
        },
        "required": ["location", "format"],
        "additionalProperties": False,
    },
}
ASKED = {"role": "user", "content": "What is the weather like in Brooklyn, New York?"}
TOOLS = {"tools": [{"type": "function", "function": WEATHER}], "temperature": 0, "max_tokens": 64}


def test_tools_that_must_be_called(client: openai.OpenAI) -> None:
    def call(choice: Any) -> Any:
        answer = client.chat.completions.create(
            model="tgi", messages=[ASKED], tool_choice=choice, parallel_tool_calls=False, **TOOLS
        )
        assert answer.choices[0].finish_reason == "tool_calls"
        assert answer.choices[0].message.content is None
        (made,) = answer.choices[0].message.tool_calls
        assert made.id and made.type == "function"
        return made.function

    named = {"type": "function", "function": {"name": "get_weather"}}
    functions = at_once(call, ("required", "get_weather", named))
    assert functions == [functions[0]] * 3 and functions[0].name == "get_weather"
    arguments = json.loads(functions[0].arguments)
    assert arguments["location"] in ("Brooklyn, NY", "Rome") and len(arguments) == 2
    stream = client.chat.completions.create(
        model="tgi", messages=[ASKED], tool_choice="required", stream=True,
        parallel_tool_calls=False, **TOOLS,
    )  # fmt: skip
    *chunks, last = [chunk.choices[0] for chunk in stream]
    deltas = [chunk.delta.tool_calls[0] for chunk in chunks]
    assert all(chunk.delta.content is None for chunk in chunks)
    assert [delta.function.name for delta in deltas] == ["get_weather"] + [None] * (len(deltas) - 1)
    assert "".join(delta.function.arguments for delta in deltas) == functions[0].arguments
    assert (last.delta.tool_calls, last.finish_reason) == (None, "tool_calls")


def test_tools_that_are_not_called(client: openai.OpenAI) -> None:
    def ask(**more: Any) -> Any:
        return client.chat.completions.create(**{"model": "tgi", "messages": QUESTION, **more})

    short = {**TOOLS, "max_tokens": 16}
    without = {"temperature": 0, "max_tokens": 16}
    called = {"id": "0", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}
    history = [
        ASKED,
        {"role": "assistant", "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "0", "content": "It is 21 degrees and sunny."},
    ]
    wishes = (without, {**short, "tool_choice": "none"}, short, {**short, "messages": history})
    plain, none, auto, reply = (
        answer.choices[0] for answer in at_once(lambda wish: ask(**wish), wishes)
    )
    assert none.message.content == plain.message.content
    for choice in (auto, reply):
        assert choice.message.content and choice.message.tool_calls is None
        assert choice.finish_reason in ("stop", "length")
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in ask(**short, stream=True))
    assert streamed == auto.message.content


# ---------------------------------------------------------------------- grammars


def test_grammars(shards: LiveServer) -> None:
    octet = r"(25[0-5]|2[0-4][0-9]|[01]?[0-9][0-9]?)"
    address = {"type": "regex", "value": rf"{octet}(\.{octet}){{3}}"}
    text = shards.generate("Whats Googles DNS", max_new_tokens=20, grammar=address)
    assert re.fullmatch(address["value"], text["generated_text"])
    mail = {"type": "regex", "value": r"[\w-]{1,9}@gmail\.com"}
    asked = {"max_new_tokens": 20, "stop": [".com"], "grammar": mail}
    crowd = at_once(lambda _: shards.generate("name: david. email:  ", **asked), range(4))
    assert crowd == [shards.generate("name: david. email:  ", **asked)] * 4
    assert re.fullmatch(mail["value"], crowd[0]["generated_text"])


def test_a_json_schema_as_text(shards: LiveServer) -> None:
    grammar = {"type": "json", "value": json.dumps(PERSON)}
    answer = shards.generate("David lives in Rome.", grammar=grammar)  # the form is what ends it
    assert answer["details"]["finish_reason"] == "eos_token"
    person = json.loads(answer["generated_text"])
    assert set(person) == {"name", "age", "tags", "home"}
    assert 0 <= person["age"] <= 99 and 1 <= len(person["tags"]) <= 2
    assert person["home"]["town"] in ("Rome", "Oslo")


def test_response_formats_of_both_apis(shards: LiveServer) -> None:
    schema = {"name": "person", "strict": True, "schema": PERSON}
    formats = (
        {"type": "json_schema", "json_schema": schema},
        {"type": "json_schema", "value": {"name": "person", "schema": PERSON}},
        {"type": "json", "value": PERSON},
        {"type": "json_object", "value": PERSON},
    )
    body = {"messages": QUESTION, "max_tokens": 120, "seed": 3}

    def ask(response_format: Any) -> str:
        answer = shards.post(
            "/v1/chat/completions", {**body, "response_format": response_format}
        ).json()
        return str(answer["choices"][0]["message"]["content"])

    texts = at_once(ask, formats)
    assert texts == [texts[0]] * 4 and isinstance(json.loads(texts[0]), dict)
    streamed = {**body, "response_format": formats[0], "stream": True}
    with httpx.stream(
        "POST", f"{shards.url}/v1/chat/completions", json=streamed, timeout=60
    ) as response:
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    chunks = [json.loads(line[6:]) for line in lines[:-1]]
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == texts[0]


# ------------------------------------------------------------- long generations


def test_long_generations_are_one(tmp_path: Path) -> None:
    """TGI began anew from the text after 1024 tokens, and whoever had stopped there got more."""
    checkpoint = make_checkpoint(tmp_path, "llama", max_position_embeddings=2048)
    with launched("--model-id", str(checkpoint)) as live:
        asked = {"max_new_tokens": 1100, "ignore_eos_token": True}
        drawn = {**asked, "seed": 5, "temperature": 0.9}
        whole, *sampled = at_once(
            lambda given: live.generate("a", **given)["details"], (asked, drawn, drawn)
        )
        assert (whole["generated_tokens"], whole["finish_reason"]) == (1100, "length")
        assert live.metrics()["tgi_request_count"] == 3
        ids = [token["id"] for token in whole["tokens"]]
        # From the ids it goes on in the same way: nothing was tokenised again on the way.
        body = {"prompt": [ord("a"), *ids[:1020]], "max_tokens": 80, "temperature": 0}
        rest = live.post("/v1/completions", {**body, "ignore_eos": True, "logprobs": 0}).json()
        logprobs = [token["logprob"] for token in whole["tokens"][1020:]]
        assert rest["choices"][0]["logprobs"]["token_logprobs"] == pytest.approx(logprobs, abs=1e-3)
        assert sampled[0] == sampled[1] and sampled[0]["generated_tokens"] == 1100
