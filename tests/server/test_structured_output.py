"""Structured output of the embedded model, on one shard and on two, alone and in company."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import jsonschema_rs
import pytest

from headgate import Client, SamplingParams, StructuredOutputsParams
from tests.server.live_server import LiveServer, sse_events

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 1, "maximum": 99},
        "langs": {"type": "array", "items": {"enum": ["fr", "de", "日本語"]}, "maxItems": 2},
    },
    "required": ["name", "age", "langs"],
    "additionalProperties": False,
}
MAIL = r"[a-z]{2,8}\.[a-z]{2,8}@(example|test)\.(com|org)"
CHAT = [{"role": "user", "content": "Describe a person."}]


@pytest.fixture(params=["server", "server_2_shards"])
def live(request: pytest.FixtureRequest) -> LiveServer:
    return request.getfixturevalue(request.param)


def chat_stream(live: LiveServer, **fields: Any) -> tuple[str, str]:
    """(text, finish_reason) of a streamed chat."""
    body = {"messages": CHAT, "stream": True, "max_tokens": 80, **fields}
    url = f"{live.url}/v1/chat/completions"
    with httpx.stream("POST", url, json=body, timeout=120) as response:
        assert response.status_code == 200, response.read()
        choices = [choice for event in sse_events(response) for choice in event["choices"]]
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    return text, choices[-1]["finish_reason"]


def test_json_schema(live: LiveServer) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "p", "strict": True, "schema": PERSON}}
    text, reason = chat_stream(live, response_format=schema, seed=1)
    assert reason == "stop"
    jsonschema_rs.Draft202012Validator(PERSON).validate(json.loads(text))
    body = {"messages": CHAT, "seed": 1, "max_tokens": 80, "guided_json": PERSON}
    whole = live.post("/v1/chat/completions", body).json()["choices"][0]
    assert (whole["message"]["content"], whole["finish_reason"]) == (text, "stop")


def test_regex(live: LiveServer) -> None:
    events = list(
        live.stream("Mail: ", max_new_tokens=60, grammar={"type": "regex", "value": MAIL})
    )
    text = events[-1]["generated_text"]
    assert re.fullmatch(MAIL, text)
    assert "".join(e["token"]["text"] for e in events if not e["token"]["special"]) == text
    assert events[-1]["details"]["finish_reason"] == "eos_token"


def test_choice(live: LiveServer) -> None:
    for wish in ({"guided_choice": ["oui", "non"]}, {"structured_outputs": {"choice": ["oui"]}}):
        text, reason = chat_stream(live, temperature=2, seed=3, **wish)
        assert text in ("oui", "non") and reason == "stop"


def test_other_ways_to_ask(server: LiveServer) -> None:
    form = {"type": "json", "value": json.dumps(PERSON)}  # TGI's, as text, on a /v1 route
    answer = server.post(
        "/v1/completions",
        {"prompt": "A person: ", "max_tokens": 80, "response_format": form, "temperature": 0},
    ).json()
    jsonschema_rs.Draft202012Validator(PERSON).validate(json.loads(answer["choices"][0]["text"]))
    body = {"prompt": "2 + 2 = ", "structured_outputs": {"grammar": 'root ::= [0-9] "."'}}
    assert re.fullmatch(r"2 \+ 2 = \d\.", server.post("/generate", body).json()["text"][0])
    mail = StructuredOutputsParams(regex=MAIL)
    with Client(server.grpc_address) as client:
        params = SamplingParams(max_tokens=60, seed=4, structured_outputs=mail)
        pieces = list(client.stream("Mail: ", params))
    assert re.fullmatch(MAIL, "".join(piece.text for piece in pieces))
    assert pieces[-1].generation is not None and pieces[-1].generation.finish_reason == "eos_token"


def test_several_answers_to_one_prompt(live: LiveServer) -> None:
    fields = {"guided_regex": MAIL, "temperature": 1.5, "seed": 6, "max_tokens": 60}
    body = {"messages": CHAT, "n": 3, **fields}
    choices = live.post("/v1/chat/completions", body).json()["choices"]
    texts = [choice["message"]["content"] for choice in choices]
    assert all(re.fullmatch(MAIL, text) for text in texts) and len(set(texts)) == 3
    assert {choice["finish_reason"] for choice in choices} == {"stop"}


def test_an_answer_that_is_cut_is_the_beginning_of_one(server: LiveServer) -> None:
    choice = server.post(
        "/v1/chat/completions",
        {"messages": CHAT, "max_tokens": 3, "guided_json": PERSON},
    ).json()["choices"][0]
    assert choice["finish_reason"] == "length" and choice["message"]["content"][0] == "{"


# ------------------------------------------------------------------ in company

SAMPLED = {"max_new_tokens": 10, "do_sample": True, "temperature": 0.9, "top_p": 0.95}
KINDS: list[dict[str, Any]] = [
    {**SAMPLED, "seed": 11, "top_n_tokens": 3},
    {**SAMPLED, "seed": 12, "grammar": {"type": "regex", "value": MAIL}, "top_n_tokens": 2},
    {**SAMPLED, "seed": 13, "grammar": {"type": "json", "value": PERSON}},
    {"max_new_tokens": 10, "decoder_input_details": True, "repetition_penalty": 1.2},
]


def told(live: LiveServer, index: int) -> Any:
    """All that an answer says of its tokens: ids, texts, logprobs, alternatives."""
    parameters = KINDS[index % len(KINDS)]
    details = live.generate(f"Item {index // len(KINDS)}. Once upon a time", **parameters)[
        "details"
    ]
    return details["prefill"], details["tokens"], details.get("top_tokens")


def test_seeds_grammars_and_logprobs_are_the_same_alone_and_under_load(live: LiveServer) -> None:
    alone = [told(live, index) for index in range(len(KINDS) + 1)]
    with ThreadPoolExecutor(32) as pool:
        company = list(pool.map(lambda index: told(live, index), range(32)))
    assert company[: len(alone)] == alone


BAD: list[dict[str, Any]] = [
    {"type": "regex", "value": "a["},
    {"type": "json", "value": {"type": "object", "not": {}}},
    {"type": "json", "value": {"$ref": "#"}},
    {"type": "json", "value": {"allOf": [
        {"anyOf": [{"properties": {f"{i}{j}": {}}} for j in range(4)]} for i in range(6)]}},
]  # fmt: skip


def test_bad_grammars_hurt_nobody(server: LiveServer) -> None:
    expected = [told(server, index) for index in range(4)]

    def ask(index: int) -> Any:
        if index % 3:
            return told(server, index % 4)
        body = {"inputs": "x", "parameters": {"grammar": BAD[index // 3 % len(BAD)]}}
        response = server.post("/generate_stream", body)
        return response.status_code, response.json()["error_type"]

    with ThreadPoolExecutor(18) as pool:
        answers = list(pool.map(ask, range(18)))
    for index, answer in enumerate(answers):
        assert answer == (expected[index % 4] if index % 3 else (422, "validation"))
