"""What a gateway process is told at its start.

Nothing about the model: that comes from the router.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """Times in seconds, sizes in bytes."""

    router_address: str  # gRPC target of the router's private service, "unix:/..."
    status_path: str = ""  # the launcher's status.json; empty: none
    api_key: str = ""  # empty: no key is asked for
    cors_allow_origin: tuple[str, ...] = ()  # empty: any origin
    payload_limit: int = 2_000_000  # longest request body
    max_client_batch_size: int = 4  # prompts in one /v1/completions call
    vllm_stream_nul: bool = False  # streams in vLLM's shape end their objects with NUL
    strict: bool = False  # unknown request fields are refused, not only told
    tool_call_parser: str = "auto"  # a key of parsers.choice.TOOL_PARSERS, or "auto"
    reasoning_parser: str = "auto"  # "off", "auto" or "deepseek_r1"
    compute_type: str = "cpu"  # the response header x-compute-type
    keep_alive_seconds: float = 15.0  # silence on an event stream before a comment line
    router_timeout: float = 60.0  # how long requests wait for a router that is gone
    slow_client_timeout: float = 60.0  # how long a client may take no byte of its stream
    write_buffer_limit: int = 65_536  # bytes held for one client before the router is told to pause
    shutdown_timeout: float = 90.0  # how long open responses may go on after SIGTERM
    predict_route: str = ""  # a second path of /vertex; empty: none
    health_route: str = ""  # a second path of /health; empty: none
    hostname: str = "0.0.0.0"  # for log lines only: the socket is inherited
    port: int = 0  # for log lines only
