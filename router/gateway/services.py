"""What every route needs: the router's stream, the slow timer, the settings."""

from __future__ import annotations

from dataclasses import dataclass

from headgate.proto import router_pb2
from headgate.router.errors import UnavailableError
from headgate.router.gateway.config import GatewayConfig
from headgate.router.gateway.router_client import RouterClient
from headgate.router.gateway.server_state import ServerState
from headgate.router.gateway.sse import Housekeeper


@dataclass(frozen=True, slots=True)
class Services:
    """One of each per process."""

    config: GatewayConfig
    state: ServerState
    client: RouterClient
    housekeeper: Housekeeper

    @classmethod
    def of(cls, config: GatewayConfig) -> Services:
        state = ServerState(config.status_path)
        client = RouterClient(config, state)
        housekeeper = Housekeeper(config.keep_alive_seconds, config.slow_client_timeout)
        housekeeper.every_tick(client.expire)
        return cls(config, state, client, housekeeper)

    def serving_info(self) -> router_pb2.InfoResponse:
        """What is served. Raises the error of a request that cannot be taken now."""
        refusal = self.state.refusal()
        if refusal is not None:
            raise refusal
        return self.known_info()

    def known_info(self) -> router_pb2.InfoResponse:
        """What is or was served. Raises UnavailableError before a router has told."""
        if self.state.info is None:
            raise UnavailableError("The model is not known yet", retry_after=2.0)
        return self.state.info
