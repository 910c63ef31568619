"""Error bodies of the two families of routes, and the errors only a gateway can raise.

The error tree itself is `headgate.router.errors`; nothing here decides what is an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import orjson

from headgate.router.errors import (
    NotFoundError,
    RouterError,
    TemplateError,
    UnavailableError,
)

_QUOTED = re.compile(r"`(\w+)`")


class ModelNotFoundError(NotFoundError):
    """`model` names something else than what is served."""

    error_type = "model_not_found"


class MissingTemplateVariableError(TemplateError):
    """The chat template uses a variable that no request sets."""

    error_type = "missing_template_variable"
    prefix = "Missing template variable: "


class HealthcheckError(UnavailableError):
    """A health route's answer while the server cannot serve."""

    error_type = "healthcheck"
    default_message = "unhealthy"


class ClientGoneError(Exception):
    """The client closed its connection; nobody is left to be answered."""


GATEWAY_ERROR_TYPES: dict[str, type[RouterError]] = {
    cls.error_type: cls
    for cls in (ModelNotFoundError, MissingTemplateVariableError, HealthcheckError)
}


def tgi_error(error: RouterError, field_names: Mapping[str, str] | None = None) -> bytes:
    """The JSON body of the native routes: `error` (text) and `error_type`.

    `field_names`: the router's names of fields to the route's, where they differ.
    """
    message = _renamed(error.message, field_names or {})
    return orjson.dumps({"error": message, "error_type": error.error_type})


def openai_error(error: RouterError, field_names: Mapping[str, str]) -> bytes:
    """The JSON body of the /v1 routes: OpenAI's `error` object, and `error_type` beside it.

    `field_names`: the router's names of fields to the route's.
    """
    message, code = _renamed(error.message, field_names), error.error_type
    if error.context_length:  # OpenAI's code and sentence, which its clients look for
        code = "context_length_exceeded"
        message += f". This model's maximum context length is {error.context_length} tokens."
    return orjson.dumps(
        {
            "error": {
                "message": message,
                "type": _openai_type(error.http_status),
                "param": field_names.get(error.field, error.field) or None,
                "code": code,
                "http_status_code": error.http_status,
            },
            "error_type": error.error_type,
        }
    )


def retry_after_header(error: RouterError) -> list[tuple[bytes, bytes]]:
    """`retry-after` in whole seconds, for errors that pass by themselves."""
    if error.retry_after is None and error.http_status not in (429, 503):
        return []
    seconds = max(1, math.ceil(error.retry_after or 1.0))
    return [(b"retry-after", str(seconds).encode())]


def _renamed(message: str, field_names: Mapping[str, str]) -> str:
    """The message with the route's names of fields, which stand in backquotes."""
    return _QUOTED.sub(lambda found: f"`{field_names.get(found[1], found[1])}`", message)


def _openai_type(status: int) -> str:
    if status == 401:
        return "authentication_error"
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 and status != 424 else "server_error"
