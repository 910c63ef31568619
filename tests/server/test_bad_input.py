"""Bad input of every kind gets the documented error, and the server goes on."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.server.live_server import LiveServer


def _native(**parameters: Any) -> dict[str, Any]:
    return {"inputs": "hi", "parameters": parameters}


VALIDATION_ROWS = [
    ({"inputs": ""}, "inputs"),
    (_native(temperature=0.0), "temperature"),
    (_native(temperature=-1.0), "temperature"),
    (_native(top_p=0.0), "top_p"),
    (_native(top_p=1.5), "top_p"),
    (_native(typical_p=-0.1), "typical_p"),
    (_native(top_k=0), "top_k"),
    (_native(repetition_penalty=0.0), "repetition_penalty"),
    (_native(frequency_penalty=2.5), "frequency_penalty"),
    (_native(max_new_tokens=0), "max_new_tokens"),
    (_native(max_new_tokens=10**6), "max_new_tokens"),
    (_native(stop=["a"] * 5), "stop"),
    (_native(top_n_tokens=99), "top_n_tokens"),
    (_native(truncate=0), "truncate"),
    (_native(best_of=2), "best_of"),
    (_native(grammar={"type": "regex", "value": "a["}), "grammar"),
    (_native(grammar={"type": "json", "value": {"not": {}}}), "not"),
    ({"inputs": "word " * 9000}, "inputs"),
]


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
@pytest.mark.parametrize(("body", "field"), VALIDATION_ROWS)
def test_parameters_out_of_range(
    server: LiveServer, path: str, body: dict[str, Any], field: str
) -> None:
    response = server.post(path, body)
    assert response.status_code == 422, response.text
    answer = response.json()
    assert answer["error_type"] == "validation"
    assert field in answer["error"]


OPENAI_ROWS = [
    ({"temperature": -0.5}, 422, "temperature"),
    ({"max_tokens": 0}, 422, "max_"),
    ({"n": 0}, 422, "n"),
    ({"tools": [{"type": "function", "function": {"name": "f g"}}]}, 422, "tools"),
    ({"response_format": {"type": "yaml"}}, 422, "response_format"),
    ({"guided_json": {"type": "array", "contains": {}}}, 422, "contains"),
    ({"logit_bias": {"5": 101.0}}, 422, "logit_bias"),
    ({"model": "somebody/else"}, 404, "somebody/else"),
    ({"messages": []}, 422, "messages"),
    ({"messages": "hi"}, 422, "messages"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("change", "status", "word"), OPENAI_ROWS)
def test_chat_fields_out_of_range(
    server: LiveServer, change: dict[str, Any], status: int, word: str, stream: bool
) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "stream": stream}
    response = server.post("/v1/chat/completions", {**body, **change})
    assert response.status_code == status, response.text
    answer = response.json()
    assert word in answer["error"]["message"]
    assert answer["error_type"]


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b'{"inputs": "hi"', 400),
        (b'{"inputs": "\xff\xfe"}', 400),
        (b"[]", 422),
        (b'{"parameters": {}}', 422),
        (b'{"inputs": 5}', 422),
        (b'{"inputs": "hi", "parameters": {"top_k": "many"}}', 422),
        (b'{"inputs": "' + b"x" * 2_000_001 + b'"}', 413),
    ],
)
def test_bodies_that_are_no_request(server: LiveServer, content: bytes, status: int) -> None:
    response = httpx.post(
        f"{server.url}/generate",
        content=content,
        headers={"content-type": "application/json"},
        timeout=30,
    )
    assert response.status_code == status, response.text
    assert set(response.json()) >= {"error", "error_type"}


def test_unknown_routes_and_methods(server: LiveServer) -> None:
    assert httpx.get(f"{server.url}/nowhere").status_code == 404
    assert httpx.get(f"{server.url}/generate").status_code == 405


def test_unknown_fields_are_ignored_but_said(server: LiveServer) -> None:
    response = server.post("/generate", {**_native(max_new_tokens=2), "surprise": 1})
    assert response.status_code == 200
    assert "surprise" in response.headers["x-headgate-warnings"]


def test_the_server_still_answers(server: LiveServer) -> None:
    assert server.generate("hello", max_new_tokens=3)["details"]["generated_tokens"] == 3
    assert server.metrics()['tgi_request_failure{err="validation"}'] > 0
