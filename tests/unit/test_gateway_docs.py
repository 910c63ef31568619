"""docs/api.md names every route, request field, header and error type, and no others."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from headgate.proto import router_pb2
from headgate.router.errors import ERROR_TYPES
from headgate.router.gateway.app import _EXPOSED_HEADERS, Gateway
from headgate.router.gateway.config import GatewayConfig
from headgate.router.gateway.embeddings import EmbeddingsRequest
from headgate.router.gateway.errors import GATEWAY_ERROR_TYPES
from headgate.router.gateway.openai_schemas import ChatRequest, CompletionRequest, SamplingFields
from headgate.router.gateway.responses_schemas import ResponsesRequest
from headgate.router.gateway.tgi_schemas import (
    CancelRequest,
    GenerateParameters,
    GenerateRequest,
    VertexRequest,
)
from headgate.router.gateway.vllm_schemas import VllmGenerateRequest

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text()


def section(title: str) -> str:
    return re.split(r"^## ", PAGE.split(f"\n## {title}\n")[1], flags=re.MULTILINE)[0]


def first_cells(text: str) -> set[str]:
    """What is in backquotes in the first cell of each table row."""
    rows = re.findall(r"^\| ([^|]*`[^|]*) \|", text, flags=re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def fields_of(*structs: type[msgspec.Struct]) -> set[str]:
    return {field for struct in structs for field in struct.__struct_fields__}


def test_routes() -> None:
    documented = set()
    for method, paths in re.findall(r"^\| (GET|POST) \| ([^|]*) \|", PAGE, flags=re.MULTILINE):
        documented |= {(method, path) for path in re.findall(r"`([^`]+)`", paths)}
    served = {
        (method, route.path.replace(":path", ""))
        for route in Gateway(GatewayConfig(router_address="unix:none")).routes
        for method in (route.methods or set()) - {"HEAD"}
    }
    assert documented == served


def test_protected_routes_are_the_posts() -> None:
    rows = re.findall(r"^\| (GET|POST) \| [^|]* \| (yes|no) \|", PAGE, flags=re.MULTILINE)
    assert all((method == "POST") == (key == "yes") for method, key in rows)


def test_error_types() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \|", section("Errors"), flags=re.MULTILINE)
    known = {**ERROR_TYPES, **GATEWAY_ERROR_TYPES}
    assert {name: int(status) for name, status in rows} == {
        name: cls.http_status for name, cls in known.items()
    }


def test_request_fields() -> None:
    native = fields_of(GenerateRequest, GenerateParameters)
    assert first_cells(section("POST /generate")) == native
    vllm = first_cells(section("POST /generate with a prompt"))
    assert vllm == fields_of(VllmGenerateRequest)
    chat = first_cells(section("POST /v1/chat/completions"))
    text = first_cells(section("POST /v1/completions"))
    assert chat == fields_of(ChatRequest)
    shared = fields_of(ChatRequest) & fields_of(CompletionRequest) - {"logprobs"}
    assert text | shared == fields_of(CompletionRequest)
    assert first_cells(section("POST /v1/embeddings")) == fields_of(EmbeddingsRequest)
    responses = first_cells(section("POST /v1/responses"))
    assert responses | fields_of(SamplingFields) == fields_of(ResponsesRequest)


def test_fields_of_the_smaller_bodies() -> None:
    assert first_cells(section("POST /vertex")) == fields_of(VertexRequest)
    assert first_cells(section("POST /cancel")) == fields_of(CancelRequest)


def test_every_field_has_a_row_in_the_tables_of_clients() -> None:
    """tests/server/client_rows ask for what works, and see what does not refused or told."""
    tables = Path(__file__).parents[1] / "server" / "client_rows"
    words = set(re.findall(r"\w+", "".join(path.read_text() for path in tables.glob("*_rows.py"))))
    fields = fields_of(
        GenerateRequest, GenerateParameters, VllmGenerateRequest, ChatRequest, CompletionRequest,
        ResponsesRequest, EmbeddingsRequest, VertexRequest, CancelRequest,
    )  # fmt: skip
    assert fields - words == set()


def test_headers() -> None:
    for name in _EXPOSED_HEADERS:
        assert f"`{name}`" in PAGE, name


def test_calls() -> None:
    calls = {method.name for method in router_pb2.DESCRIPTOR.services_by_name["Router"].methods}
    assert first_cells(section("gRPC")) == calls
