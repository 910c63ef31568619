"""The errors a client can be told, each with its HTTP status, gRPC code and `error_type`.

Router and gateway raise these; the edges (service, gateway, client) translate them with
`to_proto`, `from_proto` and `from_rpc_error`. No logging and no counting happens here.
"""

from __future__ import annotations

from typing import ClassVar

import grpc

from headgate.proto import router_pb2

METADATA_KEY = "headgate-error-bin"  # trailing metadata of unary calls and plain streams


class RouterError(Exception):
    """A refused or failed request. `message` is for people, prefix included."""

    error_type: ClassVar[str] = "internal"
    http_status: ClassVar[int] = 500
    grpc_code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    prefix: ClassVar[str] = ""
    default_message: ClassVar[str] = "Internal error"

    def __init__(
        self,
        message: str = "",
        *,
        field: str = "",
        retry_after: float | None = None,
        context_length: int = 0,
    ) -> None:
        """`field`: the request field at fault; `retry_after`: seconds to wait before a new try.

        `context_length`: tokens that prompt and answer do not fit into, if that is the matter.
        """
        self.message = f"{self.prefix}{message or self.default_message}"
        self.field = field
        self.retry_after = retry_after
        self.context_length = context_length
        super().__init__(self.message)

    def to_proto(self) -> router_pb2.Error:
        return router_pb2.Error(
            error_type=self.error_type,
            message=self.message,
            http_status=self.http_status,
            retry_after=self.retry_after,
            field=self.field,
            context_length=self.context_length,
        )

    def metadata(self) -> tuple[tuple[str, bytes], ...]:
        """Trailing metadata that carries this error beside a gRPC status."""
        return ((METADATA_KEY, self.to_proto().SerializeToString()),)


class InternalError(RouterError):
    """A fault of the server itself; the log holds its traceback."""


class ValidationError(RouterError):
    """A field is missing, out of range, or asks for what is not served."""

    error_type = "validation"
    http_status = 422
    grpc_code = grpc.StatusCode.INVALID_ARGUMENT
    prefix = "Input validation error: "
    default_message = "invalid request"


class MalformedError(RouterError):
    """The body is not JSON, or not UTF-8."""

    error_type = "malformed"
    http_status = 400
    grpc_code = grpc.StatusCode.INVALID_ARGUMENT
    default_message = "The body is not valid JSON"


class PayloadTooLargeError(RouterError):
    """The body is over the payload limit."""

    error_type = "payload_too_large"
    http_status = 413
    grpc_code = grpc.StatusCode.INVALID_ARGUMENT
    default_message = "The body is too large"


class UnsupportedMediaTypeError(RouterError):
    """The content type is not JSON."""

    error_type = "unsupported_media_type"
    http_status = 415
    grpc_code = grpc.StatusCode.INVALID_ARGUMENT
    default_message = "Expected a body with `content-type: application/json`"


class UnauthorizedError(RouterError):
    """The API key is missing or wrong."""

    error_type = "unauthorized"
    http_status = 401
    grpc_code = grpc.StatusCode.UNAUTHENTICATED
    default_message = "A valid API key is required: `authorization: Bearer <key>`"


class NotFoundError(RouterError):
    """No such route, model or adapter."""

    error_type = "not_found"
    http_status = 404
    grpc_code = grpc.StatusCode.NOT_FOUND
    default_message = "Not found"


class AdapterNotFoundError(NotFoundError):
    """`adapter_id` names an adapter that is not loaded."""

    error_type = "adapter_not_found"


class MethodNotAllowedError(RouterError):
    """The route exists, but not for this HTTP method."""

    error_type = "method_not_allowed"
    http_status = 405
    grpc_code = grpc.StatusCode.UNIMPLEMENTED
    default_message = "Method not allowed"


class TemplateError(RouterError):
    """The chat template is missing or cannot render these messages."""

    error_type = "template_error"
    http_status = 422
    grpc_code = grpc.StatusCode.INVALID_ARGUMENT
    prefix = "Template error: "
    default_message = "the model has no chat template"


class OverloadedError(RouterError):
    """As many requests as the server takes are live already."""

    error_type = "overloaded"
    http_status = 429
    grpc_code = grpc.StatusCode.RESOURCE_EXHAUSTED
    default_message = "Model is overloaded"


class GenerationError(RouterError):
    """The shards failed while they computed this request."""

    error_type = "generation"
    http_status = 424
    grpc_code = grpc.StatusCode.INTERNAL
    prefix = "Request failed during generation: "
    default_message = "Server error"


class IncompleteGenerationError(RouterError):
    """The answer ended without its final message."""

    error_type = "incomplete_generation"
    http_status = 500
    grpc_code = grpc.StatusCode.ABORTED
    default_message = "Incomplete generation"


class SlowClientError(RouterError):
    """The client read its stream too slowly for the memory kept for it."""

    error_type = "slow_client"
    http_status = 408
    grpc_code = grpc.StatusCode.ABORTED
    default_message = "The stream was read too slowly"


class RequestCancelledError(RouterError):
    """Somebody ended the request by its id."""

    error_type = "cancelled"
    http_status = 499
    grpc_code = grpc.StatusCode.CANCELLED
    default_message = "The request was cancelled"


class ReplacedError(RouterError):
    """A gateway opened a second stream, which took this one's place."""

    error_type = "replaced"
    http_status = 409
    grpc_code = grpc.StatusCode.ABORTED
    default_message = "The gateway has opened another stream"


class UnavailableError(RouterError):
    """The model is still loading, or the server cannot recover."""

    error_type = "unavailable"
    http_status = 503
    grpc_code = grpc.StatusCode.UNAVAILABLE
    default_message = "The model is not available"


class DrainingError(RouterError):
    """The server is shutting down and takes no new work."""

    error_type = "draining"
    http_status = 503
    grpc_code = grpc.StatusCode.UNAVAILABLE
    default_message = "The server is shutting down"


class ReceivedError(RouterError):
    """An error told by another process whose type this version does not know."""

    def __init__(self, error: router_pb2.Error) -> None:
        super().__init__(error.message, field=error.field, retry_after=_retry_after(error))
        # A type of a newer server: its own values stand in for the class's.
        self.error_type = error.error_type or RouterError.error_type  # type: ignore[misc]
        self.http_status = error.http_status or RouterError.http_status  # type: ignore[misc]


ERROR_TYPES: dict[str, type[RouterError]] = {
    cls.error_type: cls
    for cls in (
        InternalError,
        ValidationError,
        MalformedError,
        PayloadTooLargeError,
        UnsupportedMediaTypeError,
        UnauthorizedError,
        NotFoundError,
        AdapterNotFoundError,
        MethodNotAllowedError,
        TemplateError,
        OverloadedError,
        RequestCancelledError,
        GenerationError,
        IncompleteGenerationError,
        SlowClientError,
        ReplacedError,
        UnavailableError,
        DrainingError,
    )
}


def from_proto(error: router_pb2.Error) -> RouterError:
    """The exception for an `Error` received from a router; its message is taken as it is."""
    cls = ERROR_TYPES.get(error.error_type)
    if cls is None:
        return ReceivedError(error)
    exception = cls(
        field=error.field,
        retry_after=_retry_after(error),
        context_length=error.context_length,
    )
    exception.message = error.message
    exception.args = (error.message,)
    return exception


def from_rpc_error(error: grpc.RpcError) -> RouterError:
    """The exception behind a failed call: from its trailing metadata, else from its status."""
    for key, value in error.trailing_metadata() or ():
        if key == METADATA_KEY:
            return from_proto(router_pb2.Error.FromString(value))
    code, details = error.code(), error.details() or ""
    by_code: dict[grpc.StatusCode, type[RouterError]] = {
        grpc.StatusCode.UNAVAILABLE: UnavailableError,
        grpc.StatusCode.UNAUTHENTICATED: UnauthorizedError,
        grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    }
    return by_code.get(code, InternalError)(f"{details} ({code.name})")


def _retry_after(error: router_pb2.Error) -> float | None:
    return error.retry_after if error.HasField("retry_after") else None
