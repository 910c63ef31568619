"""Flags of the gateways and the router: ports, keys, who may call, shutting down."""

from __future__ import annotations

from headgate.launcher.flag import Flag, Kind, Policy

NETWORK = (
    Flag("hostname", Kind.TEXT, "Address the HTTP port listens on.", default="0.0.0.0"),
    Flag(
        "port",
        Kind.PORT,
        "HTTP port; 0 takes a free one.",
        default=3000,
        short="p",
        env_before=("AIP_HTTP_PORT",),
    ),
    Flag(
        "grpc-port",
        Kind.PORT,
        "Port of the public gRPC service.",
        default_text="the HTTP port + 1",
        own=True,
    ),
    Flag(
        "grpc-hostname",
        Kind.TEXT,
        "Address the gRPC port listens on.",
        default="127.0.0.1",
        own=True,
    ),
    Flag(
        "gateway-workers",
        Kind.INTEGER,
        "Number of HTTP gateway processes.",
        default=1,
        minimum=1,
        maximum=64,
        own=True,
    ),
    Flag(
        "api-key",
        Kind.TEXT,
        "Key that clients must send as `Authorization: Bearer`, on HTTP and gRPC.",
        default="",
    ),
    Flag(
        "cors-allow-origin",
        Kind.LIST,
        "Origin that browsers may call from; repeatable.",
        default=(),
        default_text="any",
    ),
    Flag(
        "payload-limit",
        Kind.INTEGER,
        "Largest request body in bytes.",
        default=2_000_000,
        minimum=1,
    ),
    Flag(
        "validation-workers", Kind.INTEGER, "Tokeniser threads of the router.", default=2, minimum=1
    ),
    Flag(
        "vllm-stream-delimiter",
        Kind.TEXT,
        "What follows each object of a /generate stream in vLLM's shape; vLLM's clients of 2023 "
        "split at NUL.",
        choices=("newline", "nul"),
        default="newline",
        own=True,
    ),
    Flag(
        "strict",
        Kind.SWITCH,
        "Refuse requests that hold a field unknown to the server, with 422.",
        default=False,
        own=True,
    ),
    Flag(
        "graceful-termination-timeout",
        Kind.NUMBER,
        "Seconds that running requests may take after a stop signal.",
        default=90.0,
        minimum=0,
        short="g",
    ),
    Flag(
        "prometheus-port",
        Kind.PORT,
        "Accepted for TGI's command lines.",
        policy=Policy.NO_OP,
        note="metrics are at /metrics on the HTTP port, and nothing listens on a second one",
    ),
    Flag(
        "ngrok",
        Kind.SWITCH,
        "Tunnel through ngrok.",
        default=False,
        policy=Policy.REFUSED,
        note="there is no ngrok tunnel; run one beside the server",
        neutral=(False,),
    ),
    Flag(
        "ngrok-authtoken",
        Kind.TEXT,
        "Token of an ngrok account.",
        policy=Policy.REFUSED,
        note="there is no ngrok tunnel; run one beside the server",
    ),
    Flag(
        "ngrok-edge",
        Kind.TEXT,
        "Edge of an ngrok account.",
        policy=Policy.REFUSED,
        note="there is no ngrok tunnel; run one beside the server",
    ),
)
