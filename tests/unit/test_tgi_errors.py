"""Each error that TGI's users know: its status, type and text, on whole answers and streams."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest

from headgate.router.gateway.server_state import State
from tests.unit import fake_router as fake
from tests.unit.fake_router import Script, pb
from tests.unit.running_gateway import RunningGateway

HI = {"inputs": "Hi"}
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


def failing(error_type: str, status: int, message: str) -> Script:
    """Refuses every request."""

    async def script(conversation: fake.Conversation, submit: pb.Submit) -> None:
        conversation.send(submit, fake.error(error_type, status, message))

    return script


@dataclass(frozen=True)
class Row:
    """A request and what it is answered with."""

    name: str
    path: str
    status: int
    error_type: str
    text: str  # a part of the error's text
    body: Any = field(default_factory=lambda: dict(HI))
    script: Script | None = None
    config: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    method: str = "POST"
    template: str = ""


GENERATION = "Request failed during generation: Server error: it broke"
ROWS = [
    Row("generation", "/generate", 424, "generation", GENERATION,
        script=failing("generation", 424, GENERATION)),
    Row("generation, stream", "/generate_stream", 424, "generation", GENERATION,
        script=failing("generation", 424, GENERATION)),
    Row("overloaded", "/generate", 429, "overloaded", "Model is overloaded",
        script=failing("overloaded", 429, "Model is overloaded")),
    Row("overloaded, stream", "/generate_stream", 429, "overloaded", "Model is overloaded",
        script=failing("overloaded", 429, "Model is overloaded")),
    Row("overloaded, vertex", "/vertex", 429, "overloaded", "Model is overloaded",
        {"instances": [HI]}, failing("overloaded", 429, "Model is overloaded")),
    Row("incomplete", "/generate", 500, "incomplete_generation", "Incomplete generation",
        script=failing("incomplete_generation", 500, "Incomplete generation")),
    Row("validation", "/generate", 422, "validation", "Input validation error: `top_k` must be",
        {**HI, "parameters": {"top_k": 0}}),
    Row("incomplete, stream", "/generate_stream", 500, "incomplete_generation",
        "Incomplete generation",
        script=failing("incomplete_generation", 500, "Incomplete generation")),
    Row("template", "/v1/chat/completions", 422, "template_error", "Template error: ", CHAT,
        template="{{ raise_exception('no') }}"),
    Row("variable", "/v1/chat/completions", 422, "missing_template_variable",
        "Missing template variable: 'wings'", CHAT, template="{{ wings.length }}"),
    Row("tool", "/v1/chat/completions", 422, "validation", "`tool_choice` names `g`",
        {**CHAT, "tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "g"}),
    Row("suffix", "/v1/completions", 422, "validation", "`suffix` is not supported",
        {"prompt": "Hi", "suffix": "!"}),
    Row("prompts", "/v1/completions", 422, "validation", "more than the allowed batch of 4",
        {"prompt": ["Hi"] * 5}),
    Row("no instances", "/vertex", 422, "validation", "`instances` must hold 1 to 128 entries",
        {"instances": []}),
    Row("malformed", "/generate", 400, "malformed", "not valid JSON", b"{"),
    Row("shape", "/generate", 422, "validation", "missing field `inputs`", {}),
    Row("type", "/generate", 422, "validation", "`inputs`: expected `str`", {"inputs": 3}),
    Row("content type", "/generate", 415, "unsupported_media_type", "content-type", b"<x/>",
        headers={"content-type": "application/xml"}),
    Row("payload", "/generate", 413, "payload_too_large", "larger than 20 bytes",
        {"inputs": "x" * 20}, config={"payload_limit": 20}),
    Row("route", "/nowhere", 404, "not_found", "No route /nowhere"),
    Row("method", "/generate", 405, "method_not_allowed", "GET is not a method", method="GET"),
    Row("key", "/generate", 401, "unauthorized", "API key", config={"api_key": "k"}),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
async def test_errors(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    if row.template:
        info = pb.InfoResponse()
        info.CopyFrom(fake.INFO)
        info.chat_template = row.template
        monkeypatch.setattr(fake, "INFO", info)
    async with RunningGateway(row.script, **row.config) as running:
        content = row.body if isinstance(row.body, bytes) else json.dumps(row.body).encode()
        headers = {"content-type": "application/json", **row.headers}
        response = await running.http.request(
            row.method, row.path, content=content, headers=headers
        )
        assert response.status_code == row.status, response.text
        answer = response.json()
        assert answer["error_type"] == row.error_type
        if row.path.startswith("/v1/"):
            error = answer["error"]
            assert (error["code"], error["http_status_code"]) == (row.error_type, row.status)
            assert row.text in error["message"]
        else:
            assert row.text in answer["error"] and set(answer) == {"error", "error_type"}
        assert ("retry-after" in response.headers) == (row.status in (429, 503))


async def test_an_unhealthy_server_says_so() -> None:
    async with RunningGateway(router=False) as running:
        assert running.gateway.services.state.current()[0] is State.LOADING
        for path in ("/health", "/ping", "/"):
            response = await running.http.get(path)
            assert response.status_code == 503
            assert response.json()["error_type"] == "healthcheck"
            assert response.json()["error"] == "unhealthy"


@pytest.mark.parametrize(
    ("path", "body"), [("/generate_stream", HI), ("/v1/chat/completions", CHAT)]
)
async def test_errors_after_the_beginning_are_the_last_event(
    path: str, body: dict[str, Any]
) -> None:
    async def breaks(conversation: fake.Conversation, submit: pb.Submit) -> None:
        conversation.send(submit, fake.accepted())
        conversation.send(submit, fake.tokens(0, fake.token(1, "a"), text="a", offset=0))
        conversation.send(submit, fake.error("generation", 424, GENERATION))

    async with RunningGateway(breaks) as running:
        events = await running.stream(path, {**body, "stream": True})
        if path.startswith("/v1/"):
            assert events[-1] == "[DONE]"
            assert events[-2]["error"]["http_status_code"] == 424
        else:
            assert events[-1] == {"error": GENERATION, "error_type": "generation"}
