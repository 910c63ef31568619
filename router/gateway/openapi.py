"""The API's description: an OpenAPI 3.1 document made from the schemas and the rows of the routes.

GET /openapi.json answers it with the limits of the server at hand, GET /docs shows it as a page,
`headgate print-schema` prints it without a server.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import msgspec
import orjson

from headgate import __version__
from headgate.proto import router_pb2
from headgate.router.gateway.answer_schemas import (
    ErrorAnswer,
    OpenAIErrorAnswer,
    UnhealthyAnswer,
)
from headgate.router.gateway.exchange import JSON_HEADERS, Exchange
from headgate.router.gateway.openapi_fields import PHRASES, REQUIRED, SHAPES, ranges
from headgate.router.gateway.openapi_routes import EVENTS, OPERATIONS, Operation
from headgate.router.gateway.services import Services

_REASONS = {
    400: "The body is not JSON",
    401: "The API key is missing or wrong",
    404: "No such model, adapter or request",
    413: "The body is too large",
    415: "The body is not JSON and was declared as something else",
    422: "A field is missing, out of range or not served; the text names it",
    424: "The shards failed on this request",
    429: "Too many requests at a time",
    499: "The request was cancelled by its id",
    500: "A fault of the server",
    503: "The server is loading, draining or cannot recover",
}
_PAGE = Path(__file__).with_name("docs_page.html")
_PAGE_HEADERS = [
    (b"content-type", b"text/html; charset=utf-8"),
    (b"content-security-policy", b"default-src 'self'; style-src 'unsafe-inline'; "
     b"script-src 'unsafe-inline'; connect-src 'self'"),
]  # fmt: skip
Schema = dict[str, Any]
_EVENT: Schema = {
    "type": "object",
    "description": "One event of the stream.",
    "properties": {"data": {"type": "string"}, "event": {"type": "string"}},
}


class OpenApiRoutes:
    """The routes of the description. They answer before a model is there, too."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def document(self, exchange: Exchange) -> None:
        info = self._services.state.info or DEFAULT_INFO
        has_key = bool(self._services.config.api_key)
        await exchange.respond(orjson.dumps(make_document(info, has_key)), headers=JSON_HEADERS)

    async def page(self, exchange: Exchange) -> None:
        await exchange.respond(_PAGE.read_bytes(), headers=_PAGE_HEADERS)


# TGI's limits, for a description without a server.
DEFAULT_INFO = router_pb2.InfoResponse(
    served_model_name="tgi",
    max_concurrent_requests=128,
    max_best_of=2,
    max_stop_sequences=4,
    max_top_n_tokens=5,
    max_input_tokens=4095,
    max_total_tokens=4096,
)


def make_document(info: router_pb2.InfoResponse, has_key: bool) -> Schema:
    """The document. `has_key`: whether protected routes want a key."""
    types: list[Any] = [ErrorAnswer, OpenAIErrorAnswer, UnhealthyAnswer]
    for operation in OPERATIONS:
        types += [*operation.bodies, *operation.answers]
    schemas, components = msgspec.json.schema_components(
        types, ref_template="#/components/schemas/{name}"
    )
    by_type = {_key(kind): schema for kind, schema in zip(types, schemas, strict=True)}
    bodies = {_name(kind) for operation in OPERATIONS for kind in operation.bodies}
    _describe(components, _reachable(components, bodies), ranges(info))
    paths: dict[str, Schema] = {}
    for operation in OPERATIONS:
        entry = _operation(operation, by_type, has_key)
        paths.setdefault(operation.path, {})[operation.method] = entry
    document: Schema = {
        "openapi": "3.1.0",
        "info": {
            "title": "Headgate",
            "version": __version__,
            "description": "TGI's, OpenAI's and vLLM's ways to ask one model.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {"schemas": components},
    }
    if has_key:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return document


# ----------------------------------------------------------------- operations


def _operation(operation: Operation, by_type: dict[str, Schema], has_key: bool) -> Schema:
    entry: Schema = {
        "operationId": f"{operation.method}{operation.path}".replace("/", "_").strip("_{}"),
        "tags": [operation.tag],
        "summary": operation.summary,
        "responses": {"200": {"description": "Success", "content": _content(operation, by_type)}},
    }
    for status in operation.statuses:
        if status == 401 and not has_key:
            continue
        entry["responses"][str(status)] = _refusal(operation, status)
    if "{model}" in operation.path:
        schema = {"type": "string", "minLength": 1}
        entry["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": schema}]
    if operation.bodies:
        content: Schema = {"schema": _any_of([by_type[_key(body)] for body in operation.bodies])}
        if operation.examples:
            content["examples"] = {
                name: {"value": value} for name, value in operation.examples.items()
            }
        entry["requestBody"] = {"required": True, "content": {"application/json": content}}
    if operation.protected and has_key:
        entry["security"] = [{"key": []}]
    return entry


def _content(operation: Operation, by_type: dict[str, Schema]) -> Schema:
    content: Schema = {
        kind: {"schema": _EVENT if kind == EVENTS else {"type": "string"}}
        for kind in operation.streams
    }
    if operation.answers:
        shapes = [by_type[_key(answer)] for answer in operation.answers]
        content["application/json"] = {"schema": _any_of(shapes)}
    return content


def _refusal(operation: Operation, status: int) -> Schema:
    kind = OpenAIErrorAnswer if operation.path.startswith("/v1/") else ErrorAnswer
    reference = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {
        "description": _REASONS[status],
        "content": {"application/json": {"schema": reference}},
    }


def _any_of(schemas: list[Schema]) -> Schema:
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}


def _key(kind: Any) -> str:
    return repr(kind)


def _name(kind: type) -> str:
    return kind.__name__


# -------------------------------------------------------------------- schemas


def _reachable(components: Schema, names: set[str]) -> set[str]:
    """Components that the named ones refer to, themselves included."""
    found: set[str] = set()
    left = list(names)
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            text = orjson.dumps(components[name]).decode()
            left += [other for other in components if f'schemas/{other}"' in text]
    return found


def _describe(components: Schema, names: set[str], limits: dict[str, Schema]) -> None:
    """Adds ranges and phrases to the fields of the named components, in place."""
    for (name, field), shape in SHAPES.items():
        components[name]["properties"][field] = copy.deepcopy(shape)
    for name, required in REQUIRED.items():
        components[name]["required"] = required
    for name in names:
        for field, schema in components[name].get("properties", {}).items():
            if field in PHRASES:
                schema.setdefault("description", PHRASES[field])
            for branch in schema.get("anyOf", [schema]):
                _narrow(branch, limits.get(field, {}))


_OF_TYPE = {
    "string": ("minLength", "enum"),
    "array": ("minItems", "maxItems", "items"),
    "integer": ("minimum", "maximum"),
    "number": ("minimum", "maximum", "exclusiveMinimum"),
}


def _narrow(schema: Schema, limits: Schema) -> None:
    """Those of the limits that say something of the schema's type."""
    kind = schema.get("type")
    for keyword in _OF_TYPE.get(kind, ()) if isinstance(kind, str) else ():
        if keyword in limits:
            schema[keyword] = limits[keyword]
