"""Every rule that TGI held a request against, in its order and its words, on a live server."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.live_server import LiveServer

PREFIX = "Input validation error: "
SAMPLED = {"do_sample": True}

# (parameters, what the error says behind the prefix); `small` takes 128 tokens in all.
RULES: list[tuple[dict[str, Any], str]] = [
    ({"best_of": 2}, "you must use sampling when `best_of` is > 1"),
    ({"temperature": 0}, "`temperature` must be strictly positive"),
    ({"temperature": -1}, "`temperature` must be strictly positive"),
    ({"repetition_penalty": 0}, "`repetition_penalty` must be strictly positive"),
    ({"frequency_penalty": 2.5}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
    ({"frequency_penalty": -2.5}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
    ({"top_p": 0}, "`top_p` must be > 0.0 and < 1.0"),
    ({"top_p": 1.1}, "`top_p` must be > 0.0 and < 1.0"),
    ({"typical_p": 0}, "`typical_p` must be > 0.0 and < 1.0"),
    ({"typical_p": 1.1}, "`typical_p` must be > 0.0 and < 1.0"),
    ({"top_k": 0}, "`top_k` must be strictly positive"),
    ({"top_k": -1}, "`top_k` must be strictly positive"),
    ({"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
    ({"stop": list("abcde")}, "`stop` supports up to 4 stop sequences. Given: 5"),
    ({**SAMPLED, "best_of": 2, "seed": 1}, "`seed` must not be set when `best_of` > 1"),
    ({"top_n_tokens": 6}, "`top_n_tokens` must be >= 0 and <= 5. Given: 6"),
    ({**SAMPLED, "best_of": 3}, "`best_of` must be > 0 and <= 2. Given: 3"),
    ({"truncate": 0}, "`truncate` must be strictly positive and less than 127. Given: 0"),
    ({"truncate": 128}, "`truncate` must be strictly positive and less than 127. Given: 128"),
    (
        {"max_new_tokens": 127},
        "`inputs` tokens + `max_new_tokens` must be <= 128. "
        "Given: 2 `inputs` tokens and 127 `max_new_tokens`",
    ),
]
# What follows is the compiler's to say.
GRAMMARS: list[tuple[Any, str]] = [
    ({"type": "json", "value": 3}, "grammar is not supported"),
    ({"type": "json", "value": "{"}, "grammar is not valid"),
    ({"type": "json", "value": {"type": 3}}, "grammar is not valid"),
    ({"type": "json_schema", "value": {"name": "x"}}, "`schema`"),
    ({"type": "regex", "value": "(a"}, "grammar is not valid"),
    ({"type": "poem", "value": "a"}, "`type` must be"),
]


def refusal(server: LiveServer, path: str, body: Any, status: int = 422) -> str:
    """The text of a validation error."""
    response = server.post(path, body)
    assert response.status_code == status, response.text
    answer = response.json()
    assert set(answer) == {"error", "error_type"}
    assert answer["error_type"] == "validation"
    return str(answer["error"])


@pytest.mark.parametrize(("parameters", "text"), RULES)
def test_parameters(small: LiveServer, parameters: dict[str, Any], text: str) -> None:
    body = {"inputs": "Hi", "parameters": parameters}
    assert refusal(small, "/generate", body) == PREFIX + text


@pytest.mark.parametrize(("grammar", "text"), GRAMMARS)
def test_grammars(small: LiveServer, grammar: Any, text: str) -> None:
    body = {"inputs": "Hi", "parameters": {"grammar": grammar, "max_new_tokens": 5}}
    assert text in refusal(small, "/generate", body)


def test_inputs(small: LiveServer) -> None:
    assert refusal(small, "/generate", {"inputs": ""}) == PREFIX + "`inputs` cannot be empty"
    text = "`inputs` must have less than 127 tokens. Given: 128"
    assert refusal(small, "/generate", {"inputs": "x" * 128}) == PREFIX + text


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        (
            {**SAMPLED, "best_of": 2},
            "`best_of` != 1 is not supported when streaming tokens",
        ),
        (
            {"decoder_input_details": True},
            "`decoder_input_details` == true is not supported when streaming tokens",
        ),
    ],
)
def test_streams(small: LiveServer, parameters: dict[str, Any], text: str) -> None:
    body = {"inputs": "Hi", "parameters": parameters}
    assert refusal(small, "/generate_stream", body) == PREFIX + text
    assert refusal(small, "/", {**body, "stream": True}) == PREFIX + text


def test_neutral_values_of_other_apis_are_taken(small: LiveServer) -> None:
    """What TGI refused without need: 1 is no filter; null is as if absent."""
    for parameters in ({"top_p": 1}, {"typical_p": 1}, {"best_of": 1, "seed": 1}, {"stop": None}):
        body = {"inputs": "Hi", "parameters": {**parameters, "max_new_tokens": 2}}
        assert small.post("/generate", body).status_code == 200
    assert small.post("/generate", {"inputs": "Hi", "parameters": None}).status_code == 200


def test_truncation_keeps_the_end_of_the_prompt(small: LiveServer) -> None:
    ids = small.token_ids("x" * 100 + "abc", truncate=3, max_new_tokens=4)
    assert ids == small.token_ids("abc", max_new_tokens=4)


def test_an_adapter_that_is_not_loaded_is_a_404(small: LiveServer) -> None:
    body = {"inputs": "Hi", "parameters": {"adapter_id": "french"}}
    for path in ("/generate", "/generate_stream"):
        response = small.post(path, body)
        assert (response.status_code, response.json()) == (
            404,
            {
                "error": "`adapter_id`: there is no adapter `french`",
                "error_type": "adapter_not_found",
            },
        )
    for path, field in (("/v1/completions", "prompt"), ("/v1/chat/completions", "messages")):
        value = "Hi" if field == "prompt" else [{"role": "user", "content": "Hi"}]
        response = small.post(path, {field: value, "adapter_id": "french"})
        assert response.status_code == 404
        assert response.json()["error"]["param"] == "adapter_id"
