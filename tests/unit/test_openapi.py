"""The API's description: it has every route, its references hold, and it knows the server."""

from __future__ import annotations

import json
import re

import msgspec
import pytest

from headgate.launcher.cli import main
from headgate.router.gateway.app import Gateway
from headgate.router.gateway.config import GatewayConfig
from headgate.router.gateway.openapi import DEFAULT_INFO, make_document
from headgate.router.gateway.openapi_fields import SHAPES
from headgate.router.gateway.openapi_routes import OPERATIONS
from tests.unit.fake_router import INFO
from tests.unit.running_gateway import RunningGateway


def test_every_route_has_its_row() -> None:
    served = {
        (method, route.path.replace(":path", ""))
        for route in Gateway(GatewayConfig(router_address="unix:none")).routes
        for method in (route.methods or set()) - {"HEAD"}
    }
    described = [(row.method.upper(), row.path) for row in OPERATIONS]
    assert len(described) == len(set(described))
    assert set(described) == served, "add the route to openapi_routes.py"


def test_every_body_has_an_example_but_where_it_needs_a_running_request() -> None:
    without = {row.path for row in OPERATIONS if row.bodies and not row.examples}
    assert without == {"/cancel"}
    for row in OPERATIONS:
        for value in row.examples.values():
            fitting = [body for body in row.bodies if _fits(value, body)]
            assert fitting, (row.path, value)


def _fits(value: object, body: type) -> bool:
    try:
        msgspec.convert(value, body)
    except msgspec.ValidationError:
        return False
    return set(value) <= set(body.__struct_fields__)  # type: ignore[call-overload, attr-defined]


def test_references_lead_somewhere() -> None:
    document = make_document(DEFAULT_INFO, has_key=True)
    names = set(re.findall(r'#/components/schemas/(\w+)"', json.dumps(document)))
    assert names <= set(document["components"]["schemas"])
    plain = msgspec.json.schema_components([body for row in OPERATIONS for body in row.bodies])[1]
    for schema, field in SHAPES:
        assert field in plain[schema]["properties"], (schema, field)


def test_limits_are_the_servers() -> None:
    schemas = make_document(INFO, has_key=False)["components"]["schemas"]
    field = schemas["GenerateParameters"]["properties"]["max_new_tokens"]
    assert field["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": 199}
    assert schemas["ChatRequest"]["properties"]["model"]["anyOf"][0]["enum"] == ["tgi", "model"]


def test_the_key_is_described_where_there_is_one() -> None:
    for has_key in (False, True):
        document = make_document(INFO, has_key=has_key)
        assert ("securitySchemes" in document["components"]) == has_key
        for methods in document["paths"].values():
            for method, entry in methods.items():
                assert ("security" in entry) == (has_key and method == "post")
                assert ("401" in entry["responses"]) == (has_key and method == "post")


async def test_routes() -> None:
    async with RunningGateway() as running:
        document = (await running.http.get("/openapi.json")).json()
        assert document == (await running.http.get("/api-doc/openapi.json")).json()
        assert document["paths"]["/generate"]["post"]["requestBody"]
        page = await running.http.get("/docs")
        assert page.headers["content-type"].startswith("text/html")
        # Nothing comes from elsewhere.
        assert not re.search(r"(src|href)=[\"']?(https?:)?//", page.text)
        assert "'self'" in page.headers["content-security-policy"]
    async with RunningGateway(router=False) as running:
        assert (await running.http.get("/openapi.json")).status_code == 200


def test_print_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["print-schema"]) == 0
    assert json.loads(capsys.readouterr().out) == make_document(DEFAULT_INFO, has_key=False)
