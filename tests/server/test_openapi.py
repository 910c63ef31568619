"""A live server answers every example of its own description, in the shape described, and every
curl line of docs/api.md."""

from __future__ import annotations

import json
import re
import subprocess
from typing import Any

import httpx
import jsonschema_rs
import pytest

from headgate.router.gateway.openapi_routes import OPERATIONS
from tests.server.live_server import ROOT, LiveServer

EXAMPLES = [
    pytest.param(row.path, value, id=f"{row.path} {name}")
    for row in OPERATIONS
    for name, value in row.examples.items()
]
# But for the one that starts a request in the background to cancel it.
CURLS = [
    block
    for block in re.findall(r"^((?: {4}.*\n)+)", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    if block.startswith("    curl") and "&\n" not in block
]
GETS = [row.path for row in OPERATIONS if row.method == "get" and "{" not in row.path]


@pytest.fixture(scope="module")
def description(server: LiveServer) -> dict[str, Any]:
    document: dict[str, Any] = httpx.get(f"{server.url}/openapi.json").json()
    return document


def check(description: dict[str, Any], method: str, path: str, response: httpx.Response) -> None:
    """Status, media type and JSON as described."""
    answers = description["paths"][path][method]["responses"]
    content = answers[str(response.status_code)]["content"]
    kind = response.headers.get("content-type", "").split(";")[0]
    if not content:
        assert not response.content
        return
    assert kind in content
    if kind == "application/json":
        schema = {**content[kind]["schema"], "components": description["components"]}
        jsonschema_rs.validate(schema, response.json())


@pytest.mark.parametrize(("path", "body"), EXAMPLES)
def test_examples(server: LiveServer, description: dict[str, Any], path: str, body: Any) -> None:
    response = server.post(path, body)
    assert response.status_code == 200, response.text
    assert "x-headgate-warnings" not in response.headers
    check(description, "post", path, response)


@pytest.mark.parametrize("block", CURLS)
def test_curl_lines_of_the_docs(server: LiveServer, block: str) -> None:
    command = re.sub(r"curl localhost:\d+", f"curl --silent --fail-with-body {server.url}", block)
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)


@pytest.mark.parametrize("path", GETS)
def test_gets(server: LiveServer, description: dict[str, Any], path: str) -> None:
    response = httpx.get(server.url + path)
    assert response.status_code == 200
    check(description, "get", path, response)


def test_refusals_have_the_shape_described(server: LiveServer, description: dict[str, Any]) -> None:
    for path in ("/generate", "/v1/chat/completions", "/vertex", "/cancel"):
        response = server.post(path, {})
        assert response.status_code == 422
        check(description, "post", path, response)
    check(description, "get", "/v1/models/{model}", httpx.get(f"{server.url}/v1/models/nobody"))
