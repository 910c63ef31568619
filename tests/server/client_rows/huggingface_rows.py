"""huggingface_hub's InferenceClient: text generation and chat, whole and streamed."""

from __future__ import annotations

import asyncio
import json

from huggingface_hub import AsyncInferenceClient, InferenceClient

CAPITAL = "The capital of France is"
QUESTION = [{"role": "user", "content": "What is the capital of Japan?"}]


def generate(url: str, **given: object) -> object:
    return InferenceClient(model=url).text_generation(CAPITAL, max_new_tokens=8, **given)


def row_text(url: str) -> None:
    assert "Paris" in generate(url, return_full_text=False)
    assert generate(url, return_full_text=True).startswith(CAPITAL)


def row_details(url: str) -> None:
    answer = generate(url, details=True, decoder_input_details=True, top_n_tokens=2)
    assert len(answer.details.tokens) == len(answer.details.top_tokens) == 8
    assert len(answer.details.prefill) == 5


def row_stream(url: str) -> None:
    client = InferenceClient(model=url)
    stream = client.text_generation(CAPITAL, max_new_tokens=8, stream=True)
    assert "".join(stream) == generate(url, return_full_text=False)
    events = list(client.text_generation(CAPITAL, max_new_tokens=8, stream=True, details=True))
    assert events[-1].details.finish_reason == "length"


def row_sampling(url: str) -> None:
    given = {
        "do_sample": True, "seed": 3, "temperature": 0.8, "top_k": 20, "top_p": 0.9,
        "typical_p": 0.9, "repetition_penalty": 1.1, "frequency_penalty": 0.1, "truncate": 4,
        "watermark": True, "stop": ["zzz"], "return_full_text": False,
    }  # fmt: skip
    assert generate(url, **given) == generate(url, **given)


def row_best_of(url: str) -> None:
    answer = generate(url, details=True, do_sample=True, best_of=2)
    assert len(answer.details.best_of_sequences) == 1


def row_grammar(url: str) -> None:
    text = generate(url, grammar={"type": "regex", "value": "(Rome|Oslo)"}, return_full_text=False)
    assert text in ("Rome", "Oslo")


def row_chat(url: str) -> None:
    client = InferenceClient(base_url=f"{url}/v1")
    answer = client.chat_completion(QUESTION, max_tokens=32, temperature=0, logprobs=True)
    text = answer.choices[0].message.content
    assert "Tokyo" in text and answer.choices[0].logprobs.content
    stream = client.chat_completion(
        QUESTION, max_tokens=32, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens
    assert [bool(c.usage) for c in chunks] == [not c.choices for c in chunks]
    unasked = list(client.chat_completion(QUESTION, max_tokens=4, temperature=0, stream=True))
    assert not any(chunk.usage for chunk in unasked)


def row_chat_response_format(url: str) -> None:
    schema = {"type": "object", "properties": {"city": {"enum": ["Tokyo", "Oslo"]}},
              "required": ["city"], "additionalProperties": False}  # fmt: skip
    answer = InferenceClient(base_url=f"{url}/v1").chat.completions.create(
        model="tgi",
        messages=QUESTION,
        max_tokens=32,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "city", "schema": schema, "strict": True},
        },
    )
    assert json.loads(answer.choices[0].message.content)["city"] in ("Tokyo", "Oslo")


def row_async(url: str) -> None:
    async def ask() -> str:
        return await AsyncInferenceClient(model=url).text_generation(CAPITAL, max_new_tokens=8)

    assert "Paris" in asyncio.run(ask())


def row_health_and_info(url: str) -> None:
    client = InferenceClient(model=url, provider="hf-inference")
    assert client.get_endpoint_info()["max_total_tokens"] > 0
    assert client.health_check()
