"""openai's client and gRPC stubs, in detail; test_client_tables.py has a row for each feature."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from headgate.launcher.embedded_model import ensure_embedded_model
from tests.server.live_server import ROOT, LiveServer, launched

QUESTION = [{"role": "user", "content": "What is the capital of Japan?"}]


@pytest.fixture
def client(server: LiveServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0)


def test_openai_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tgi", messages=QUESTION, temperature=0, max_tokens=32, logprobs=True, top_logprobs=2
    )
    assert "Tokyo" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.id
    content = answer.choices[0].logprobs.content
    assert "".join(token.token for token in content).startswith("The capital")
    assert all(len(token.top_logprobs) == 2 for token in content)


def test_openai_chat_stream(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="tgi",
            messages=QUESTION,
            temperature=0,
            max_tokens=32,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert "Tokyo" in text
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert [bool(c.usage) for c in chunks] == [False] * (len(chunks) - 1) + [True]


WEATHER = {
    "name": "get_weather",
    "description": "The weather in a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
}


def test_openai_tools(client: openai.OpenAI) -> None:
    """The model is small: earlier turns show it how to call."""
    messages: list[dict[str, object]] = []
    for city in ("Oslo", "Rome", "Lima"):
        function = {"name": "get_weather", "arguments": json.dumps({"city": city})}
        call = {"id": f"call_{city}", "type": "function", "function": function}
        messages += [
            {"role": "user", "content": f"Weather in {city}?"},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": call["id"], "content": "rain"},
            {"role": "assistant", "content": f"It rains in {city}."},
        ]
    ask: dict[str, object] = {
        "model": "tgi",
        "messages": [*messages, {"role": "user", "content": "Weather in Paris?"}],
        "tools": [{"type": "function", "function": WEATHER}],
        "temperature": 0,
        "max_tokens": 48,
    }
    whole = client.chat.completions.create(**ask).choices[0]  # type: ignore[call-overload]
    (made,) = whole.message.tool_calls
    assert whole.finish_reason == "tool_calls" and made.id
    assert made.function.name == "get_weather"
    assert json.loads(made.function.arguments) == {"city": "Paris"}
    with client.chat.completions.stream(**ask) as stream:  # type: ignore[arg-type]
        streamed = stream.get_final_completion().choices[0]
    assert streamed.finish_reason == "tool_calls"
    (made,) = streamed.message.tool_calls
    assert json.loads(made.function.arguments) == {"city": "Paris"}


TIME = {
    "name": "get_time",
    "parameters": {
        "type": "object",
        "properties": {"zone": {"enum": ["UTC", "CET"]}, "hours": {"type": "integer"}},
        "required": ["zone", "hours"],
        "additionalProperties": False,
    },
}


def test_openai_forced_tools(client: openai.OpenAI) -> None:
    """The model would answer with text; the calls fit their schemas all the same."""
    tools = [{"type": "function", "function": function} for function in (WEATHER, TIME)]

    def call(choice: object, **more: object) -> tuple[str, dict[str, object]]:
        answer = client.chat.completions.create(
            model="tgi", messages=QUESTION, tools=tools, tool_choice=choice, max_tokens=64,
            temperature=0.8, seed=3, parallel_tool_calls=False, **more,
        )  # fmt: skip
        assert answer.choices[0].finish_reason == "tool_calls"
        (made,) = answer.choices[0].message.tool_calls
        return made.function.name, json.loads(made.function.arguments)

    name, arguments = call("required")
    assert name in ("get_weather", "get_time") and arguments
    name, arguments = call({"type": "function", "function": {"name": "get_time"}})
    assert name == "get_time" and set(arguments) == {"zone", "hours"}
    assert arguments["zone"] in ("UTC", "CET") and isinstance(arguments["hours"], int)
    strict = [{"type": "function", **TIME, "strict": True}]
    response = client.responses.create(
        model="tgi", input="What time is it?", tools=strict, tool_choice="required",
        parallel_tool_calls=False, max_output_tokens=64, temperature=0,
    )  # fmt: skip
    (item,) = response.output
    assert item.type == "function_call" and json.loads(item.arguments)["zone"] in ("UTC", "CET")


def test_openai_responses(client: openai.OpenAI) -> None:
    ask: dict[str, object] = {
        "model": "tgi", "input": QUESTION, "temperature": 0, "max_output_tokens": 32,
    }  # fmt: skip
    whole = client.responses.create(**ask)  # type: ignore[call-overload]
    assert "Tokyo" in whole.output_text
    assert whole.status == "completed" and whole.usage.total_tokens > whole.usage.input_tokens
    with client.responses.stream(**ask) as events:  # type: ignore[arg-type]
        parts = [event.delta for event in events if event.type == "response.output_text.delta"]
        streamed = events.get_final_response()
    assert "".join(parts) == streamed.output_text == whole.output_text
    short = client.responses.create(**{**ask, "max_output_tokens": 2})  # type: ignore[call-overload]
    assert short.status == "incomplete"
    assert short.incomplete_details.reason == "max_output_tokens"


TEXTS = ["Tokyo is the capital of Japan.", "Hi", "Water boils at 100 degrees. " * 12]


@pytest.fixture(scope="module")
def mean_states() -> list[list[float]]:
    """The mean of the last hidden states of TEXTS, by Transformers."""
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModel

    path = ensure_embedded_model()
    model = AutoModel.from_pretrained(path, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    vectors = []
    with torch.inference_mode():
        for text in TEXTS:
            states = model(torch.tensor([tokenizer.encode(text).ids])).last_hidden_state[0]
            vectors.append(torch.nn.functional.normalize(states.mean(0), dim=0).tolist())
    return vectors


@pytest.mark.parametrize("fixture", ["server", "server_2_shards"])
def test_openai_embeddings(
    fixture: str, request: pytest.FixtureRequest, mean_states: list[list[float]]
) -> None:
    live: LiveServer = request.getfixturevalue(fixture)
    client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="-", max_retries=0)
    answer = client.embeddings.create(model="tgi", input=TEXTS)
    floats = client.embeddings.create(model="tgi", input=TEXTS[0], encoding_format="float")
    assert floats.data[0].embedding == pytest.approx(answer.data[0].embedding, rel=1e-6)
    for entry, expected in zip(answer.data, mean_states, strict=True):
        assert entry.embedding == pytest.approx(expected, abs=1e-3)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 3


def test_openai_completions(client: openai.OpenAI) -> None:
    whole = client.completions.create(
        model="tgi", prompt="The capital of France is", temperature=0, max_tokens=8
    )
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 8
    parts = client.completions.create(
        model="tgi", prompt="The capital of France is", temperature=0, max_tokens=8, stream=True
    )
    assert "".join(c.choices[0].text for c in parts if c.choices) == whole.choices[0].text


def test_openai_several_prompts(client: openai.OpenAI) -> None:
    prompts = ["The capital of France is", "Water boils at", "12 + 30 ="]
    together = client.completions.create(model="tgi", prompt=prompts, temperature=0, max_tokens=6)
    assert [choice.index for choice in together.choices] == [0, 1, 2]
    for prompt, choice in zip(prompts, together.choices, strict=True):
        alone = client.completions.create(model="tgi", prompt=prompt, temperature=0, max_tokens=6)
        assert alone.choices[0].text == choice.text


def test_openai_stop_is_left_out(client: openai.OpenAI) -> None:
    def ask(**more: object) -> openai.types.chat.ChatCompletion:
        return client.chat.completions.create(
            model="tgi", messages=QUESTION, temperature=0, max_tokens=32, **more
        )

    full = ask().choices[0].message.content
    stop = full[12:16]  # cuts through tokens
    stopped = ask(stop=stop).choices[0]
    assert stopped.message.content == full[: full.index(stop)]
    assert stopped.finish_reason == "stop"


def test_openai_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nobody", messages=QUESTION)
    with pytest.raises(openai.UnprocessableEntityError, match="`max_tokens`"):
        client.chat.completions.create(model="tgi", messages=QUESTION, max_tokens=10**7)
    assert [model.id for model in client.models.list().data]


def test_grpc_example_script(server: LiveServer) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "docs/examples/grpc_client.py", server.grpc_address],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.fixture(scope="module")
def locked(tiny_checkpoint: Path) -> Iterator[LiveServer]:
    with launched("--model-id", str(tiny_checkpoint), "--api-key", "Secret") as live:
        yield live


def test_api_key(locked: LiveServer) -> None:
    from grpc import RpcError, StatusCode

    from headgate import Client

    body = {"inputs": "hi", "parameters": {"max_new_tokens": 2}}
    assert locked.post("/generate", body).status_code == 401
    wrong_case = {"authorization": "Bearer secret"}
    assert locked.post("/generate", body, headers=wrong_case).status_code == 401
    right = {"authorization": "Bearer Secret"}
    assert locked.post("/generate", body, headers=right).status_code == 200
    assert locked.metrics()
    with Client(locked.grpc_address, api_key="Secret") as client:
        assert len(client.generate("hi", max_new_tokens=2).tokens) == 2
    with Client(locked.grpc_address) as client, pytest.raises(Exception) as refusal:
        client.generate("hi", max_new_tokens=2)
    cause = refusal.value
    assert isinstance(cause, RpcError) is False or cause.code() == StatusCode.UNAUTHENTICATED
    assert "key" in str(cause).lower()
