"""litellm: chat and completion, streams, errors, as for OpenAI's servers and for vLLM's."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import litellm

QUESTION = [{"role": "user", "content": "What is the capital of Japan?"}]
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Tokyo", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}


def ask(url: str, **more: Any) -> Any:
    given = {"model": "openai/tgi", "messages": QUESTION, "temperature": 0, "max_tokens": 32}
    return litellm.completion(**{**given, **more}, api_base=f"{url}/v1", api_key="-")


def row_completion(url: str) -> None:
    answer = ask(url)
    assert "Tokyo" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop" and answer.usage.total_tokens > 0


def row_stream(url: str) -> None:
    chunks = list(ask(url, stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == ask(url).choices[0].message.content


def row_async(url: str) -> None:
    answer = asyncio.run(
        litellm.acompletion(
            model="openai/tgi", messages=QUESTION, temperature=0, max_tokens=32,
            api_base=f"{url}/v1", api_key="-",
        )
    )  # fmt: skip
    assert "Tokyo" in answer.choices[0].message.content


def row_as_a_vllm_server(url: str) -> None:
    answer = ask(url, model="hosted_vllm/tgi", extra_body={"top_k": 1})
    assert "Tokyo" in answer.choices[0].message.content


def row_text_completion(url: str) -> None:
    answer = litellm.text_completion(
        model="text-completion-openai/tgi", prompt="The capital of France is", temperature=0,
        max_tokens=8, api_base=f"{url}/v1", api_key="-",
    )  # fmt: skip
    assert "Paris" in answer.choices[0].text


def row_stop_seed_and_choices(url: str) -> None:
    answers = [
        ask(url, temperature=1, seed=4, n=2, max_tokens=6, stop=["\n"]).choices for _ in range(2)
    ]
    texts = [[choice.message.content for choice in choices] for choices in answers]
    assert texts[0] == texts[1] and len(texts[0]) == 2


def row_response_format(url: str) -> None:
    schema = {"name": "city", "strict": True, "schema": CITY}
    answer = ask(url, response_format={"type": "json_schema", "json_schema": schema})
    assert json.loads(answer.choices[0].message.content)["city"] in ("Tokyo", "Oslo")


def row_errors(url: str) -> None:
    for change, kind in (
        ({"model": "openai/nobody"}, litellm.NotFoundError),
        ({"max_tokens": 10**7}, litellm.ContextWindowExceededError),
    ):
        try:
            ask(url, **change, num_retries=0)
        except kind:
            continue
        raise AssertionError(f"no {kind.__name__}")
