"""text-generation, TGI's own old client: whole answers, streams, chat, asyncio, errors."""

from __future__ import annotations

import asyncio
import json

import requests
from text_generation import AsyncClient, Client
from text_generation.errors import ValidationError
from text_generation.types import ChatCompletionChunk, Choice, ChoiceDelta

CAPITAL = "The capital of France is"
QUESTION = [{"role": "user", "content": "What is the capital of Japan?"}]


def row_generate(url: str) -> None:
    answer = Client(url).generate(CAPITAL, max_new_tokens=8, decoder_input_details=True)
    assert "Paris" in answer.generated_text
    assert answer.details.generated_tokens == 8 and len(answer.details.prefill) == 5, answer
    assert answer.details.finish_reason == "length"


def row_stream(url: str) -> None:
    answer = Client(url).generate(CAPITAL, max_new_tokens=8)
    streamed = list(Client(url).generate_stream(CAPITAL, max_new_tokens=8))
    assert "".join(event.token.text for event in streamed) == answer.generated_text
    assert streamed[-1].generated_text == answer.generated_text


def row_sampling(url: str) -> None:
    given = {
        "do_sample": True, "seed": 3, "temperature": 0.8, "top_k": 20, "top_p": 0.9,
        "typical_p": 0.9, "repetition_penalty": 1.1, "frequency_penalty": 0.1,
        "watermark": True, "max_new_tokens": 4,
    }  # fmt: skip
    first = Client(url).generate("Hello", **given)
    assert first.details.seed == 3
    assert Client(url).generate("Hello", **given).generated_text == first.generated_text


def row_best_of(url: str) -> None:
    answer = Client(url).generate("Hello", max_new_tokens=4, do_sample=True, best_of=2)
    assert len(answer.details.best_of_sequences) == 1


def row_stop_and_full_text(url: str) -> None:
    answer = Client(url).generate(
        CAPITAL, max_new_tokens=20, stop_sequences=["Paris"], return_full_text=True
    )
    assert answer.generated_text.startswith(CAPITAL)
    assert answer.generated_text.endswith("Paris")
    assert answer.details.finish_reason == "stop_sequence"


def row_alternatives_and_truncation(url: str) -> None:
    answer = Client(url).generate(CAPITAL, max_new_tokens=2, top_n_tokens=2, truncate=3)
    assert [len(place) for place in answer.details.top_tokens] == [2, 2]


def row_grammar(url: str) -> None:
    from text_generation.types import Grammar, GrammarType

    grammar = Grammar(type=GrammarType.Regex, value="(Rome|Oslo)")
    answer = Client(url).generate("A city: ", max_new_tokens=8, grammar=grammar)
    assert answer.generated_text in ("Rome", "Oslo")


def row_chat(url: str) -> None:
    answer = Client(url).chat(QUESTION, max_tokens=32, temperature=0.0, seed=1)
    assert "Tokyo" in answer.choices[0].message.content


def row_chat_parameters(url: str) -> None:
    given = {
        "max_tokens": 6, "temperature": 0.8, "top_p": 0.9, "seed": 2, "n": 2, "logprobs": True,
        "top_logprobs": 2, "frequency_penalty": 0.1, "presence_penalty": 0.1,
        "repetition_penalty": 1.1,
    }  # fmt: skip
    answer, again = (Client(url).chat(QUESTION, **given) for _ in range(2))
    texts = [choice.message.content for choice in answer.choices]
    assert len(texts) == 2 and texts == [choice.message.content for choice in again.choices]
    assert len(answer.choices[0].logprobs["content"][0]["top_logprobs"]) == 2


def row_chat_tools(url: str) -> None:
    schema = {"type": "object", "properties": {"city": {"enum": ["Tokyo", "Oslo"]}},
              "required": ["city"], "additionalProperties": False}  # fmt: skip
    tool = {"type": "function", "function": {"name": "weather", "parameters": schema}}
    answer = Client(url).chat(QUESTION, tools=[tool], tool_choice="weather", max_tokens=64)
    (call,) = answer.choices[0].message.tool_calls
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"])["city"] in ("Tokyo", "Oslo")


def row_chat_stream(url: str) -> None:
    """With TGI, too, it fails at `[DONE]`; and since pydantic 2 it wants a field of every chunk
    that TGI does not send, as it did not want with pydantic 1."""
    ChoiceDelta.model_fields["tool_calls"].default = None
    for model in (ChoiceDelta, Choice, ChatCompletionChunk):
        model.model_rebuild(force=True)
    texts, reason = [], None
    stream = Client(url).chat(QUESTION, stream=True, max_tokens=32, temperature=0.0)
    try:
        for chunk in stream:
            texts.append(chunk.choices[0].delta.content)
            reason = chunk.choices[0].finish_reason
    except json.JSONDecodeError as error:
        assert error.doc.strip() == "[DONE]", error.doc
    whole = Client(url).chat(QUESTION, max_tokens=32, temperature=0.0)
    assert "".join(texts) == whole.choices[0].message.content and reason == "stop"
    assert len(texts) > 3


def row_what_the_client_has_no_name_for(url: str) -> None:
    """Fields of `parameters` that came later, and an adapter that is not loaded."""
    more = {"min_new_tokens": 4, "ignore_eos_token": True, "min_p": 0.1, "presence_penalty": 0.1,
            "stop_token_ids": [0], "max_new_tokens": 4}  # fmt: skip
    body = {"inputs": CAPITAL, "parameters": {**more, "details": True}}
    answer = requests.post(f"{url}/generate", json=body, timeout=60).json()
    assert answer["details"]["generated_tokens"] == 4
    body["parameters"]["adapter_id"] = "nobody"
    assert requests.post(f"{url}/generate", json=body, timeout=60).status_code == 404


def row_async(url: str) -> None:
    answer = asyncio.run(AsyncClient(url).generate(CAPITAL, max_new_tokens=8))
    assert "Paris" in answer.generated_text


def row_errors(url: str) -> None:
    for change in ({"max_new_tokens": 10**6}, {"truncate": 10**6}):
        try:
            Client(url).generate("Hello", **change)
        except ValidationError as error:
            assert next(iter(change)) in str(error)
            continue
        raise AssertionError("no ValidationError")
