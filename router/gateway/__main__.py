"""Starts a gateway on a socket it inherits. Exit code 0 when asked to stop."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator

import uvicorn

from headgate import garbage
from headgate.config_file import ConfigError, load_config
from headgate.log import set_up_logging
from headgate.router.gateway.app import Gateway
from headgate.router.gateway.config import GatewayConfig
from headgate.router.gateway.http_protocol import HttpProtocol

logger = logging.getLogger(__name__)

_IDLE_CONNECTION_SECONDS = 75  # longer than the 60 s of common proxies and client pools


class _Server(uvicorn.Server):
    """uvicorn, ending with code 0 on a signal where it would raise the signal again."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield


def main() -> int:
    parser = argparse.ArgumentParser(prog="headgate.router.gateway", description=__doc__)
    parser.add_argument("--config", required=True, help="JSON file with a GatewayConfig")
    parser.add_argument("--fd", required=True, type=int, help="listening TCP socket to serve on")
    arguments = parser.parse_args()
    set_up_logging(f"gateway-{os.environ.get('HEADGATE_GATEWAY_INDEX', '0')}")
    try:
        config = load_config(GatewayConfig, arguments.config)
    except (OSError, ValueError, ConfigError) as error:
        logger.error("the gateway's configuration cannot be read: %s", error)
        return 2
    if not (config.api_key.isascii() and config.api_key.isprintable()):
        logger.error("--api-key may hold printable ASCII characters only: it travels in headers")
        return 2
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    server = _Server(
        uvicorn.Config(
            Gateway(config),
            loop="uvloop",
            http=HttpProtocol,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=_IDLE_CONNECTION_SECONDS,
            timeout_graceful_shutdown=max(1, int(config.shutdown_timeout)),
        )
    )
    garbage.settle()
    server.run(sockets=[socket.socket(fileno=arguments.fd)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
