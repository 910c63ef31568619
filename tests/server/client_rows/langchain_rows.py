"""langchain-openai: chat and completion models, streams, batches, tools, structured output."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI

QUESTION = "What is the capital of Japan?"
CITY = {
    "title": "city",
    "type": "object",
    "properties": {"city": {"enum": ["Tokyo", "Oslo"]}, "big": {"type": "boolean"}},
    "required": ["city", "big"],
    "additionalProperties": False,
}


def chat(url: str, **more: Any) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=f"{url}/v1", api_key="-", model="tgi", temperature=0, max_tokens=32, **more
    )


def row_invoke(url: str) -> None:
    answer = chat(url).invoke([SystemMessage("Answer briefly."), HumanMessage(QUESTION)])
    assert "Tokyo" in answer.content, answer
    assert answer.response_metadata["finish_reason"] == "stop"
    usage = answer.usage_metadata
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"] > 0


def row_stream(url: str) -> None:
    chunks = list(chat(url, stream_usage=True).stream(QUESTION))
    text = "".join(str(chunk.content) for chunk in chunks)
    assert text == chat(url).invoke(QUESTION).content
    assert any(chunk.usage_metadata for chunk in chunks)


def row_batch(url: str) -> None:
    questions = [QUESTION, "What is 2 + 2?"]
    together = chat(url).batch(questions)
    assert [a.content for a in together] == [chat(url).invoke(q).content for q in questions]


def row_async(url: str) -> None:
    answer = asyncio.run(chat(url).ainvoke(QUESTION))
    assert "Tokyo" in answer.content


def row_history(url: str) -> None:
    messages = [HumanMessage("My name is Ada."), AIMessage("Hello, Ada."), HumanMessage("Thanks!")]
    assert chat(url).invoke(messages).content


def row_stop_and_logprobs(url: str) -> None:
    whole = chat(url).invoke(QUESTION).content
    stopped = chat(url).invoke(QUESTION, stop=[whole[10:14]]).content
    assert stopped == whole[: whole.index(whole[10:14])]
    answer = chat(url, logprobs=True, top_logprobs=2).invoke(QUESTION)
    assert len(answer.response_metadata["logprobs"]["content"][0]["top_logprobs"]) == 2


def row_structured_output(url: str) -> None:
    model = chat(url).with_structured_output(CITY, method="json_schema")
    answer = model.invoke(QUESTION)
    assert set(answer) == {"city", "big"} and isinstance(answer["big"], bool)


def row_bind_tools(url: str) -> None:
    tool = {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
    answer = chat(url).bind_tools([tool]).invoke("What is the weather in Oslo?")
    assert isinstance(answer.content, str)
    for call in answer.tool_calls:
        json.dumps(call["args"])


def row_several_choices(url: str) -> None:
    model = ChatOpenAI(
        base_url=f"{url}/v1", api_key="-", model="tgi", temperature=1, max_tokens=6, n=2, seed=1
    )
    assert len(model.generate([[HumanMessage(QUESTION)]]).generations[0]) == 2


def row_completion_model(url: str) -> None:
    model = OpenAI(base_url=f"{url}/v1", api_key="-", model="tgi", temperature=0, max_tokens=8)
    text = model.invoke("The capital of France is")
    assert "Paris" in text
    assert "".join(model.stream("The capital of France is")) == text
