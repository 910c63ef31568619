"""The server's state and what is served, as told to gateways, health checks and users.

Says what others decided; starts and stops nothing.
"""

from __future__ import annotations

from collections.abc import Callable

from headgate import __version__
from headgate.proto import router_pb2
from headgate.router.config import RouterConfig
from headgate.router.tokenizer import ChatFiles

LOADING = router_pb2.SERVER_STATE_LOADING
READY = router_pb2.SERVER_STATE_READY
RECOVERING = router_pb2.SERVER_STATE_RECOVERING
DRAINING = router_pb2.SERVER_STATE_DRAINING
FAILED = router_pb2.SERVER_STATE_FAILED

Listener = Callable[[], None]


class ServerStatus:
    """One per router. Listeners are called at each change."""

    def __init__(self, config: RouterConfig, chat: ChatFiles) -> None:
        self.state: router_pb2.ServerState = LOADING
        self.detail = "waiting for the shards"
        self.was_ready = False  # at least once
        self.epoch = 0
        self.max_batch_total_tokens = 0
        self._config = config
        self._chat = chat
        self._listeners: list[Listener] = []

    def set(self, state: router_pb2.ServerState, detail: str = "") -> None:
        """FAILED is for good; DRAINING gives way to FAILED only."""
        if self.state == FAILED or (self.state == DRAINING and state != FAILED):
            return
        if (state, detail) == (self.state, self.detail):
            return
        self.state, self.detail = state, detail
        self.was_ready = self.was_ready or state == READY
        for listener in list(self._listeners):
            listener()

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Returns what ends the subscription."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def message(self) -> router_pb2.ServerStatus:
        return router_pb2.ServerStatus(state=self.state, detail=self.detail, info=self.info())

    def info(self) -> router_pb2.InfoResponse:
        config, chat = self._config, self._chat
        return router_pb2.InfoResponse(
            model_id=config.model_id,
            served_model_name=config.served_model_name,
            model_sha=config.model_sha or config.revision,
            version=__version__,
            dtype=config.dtype,
            device=config.device,
            num_shards=config.num_shards,
            epoch=self.epoch,
            max_concurrent_requests=config.max_concurrent_requests,
            max_best_of=config.max_best_of,
            max_stop_sequences=config.max_stop_sequences,
            max_top_n_tokens=config.max_top_n_tokens,
            max_input_tokens=config.max_input_tokens,
            max_total_tokens=config.max_total_tokens,
            max_batch_prefill_tokens=config.max_batch_prefill_tokens,
            max_batch_total_tokens=self.max_batch_total_tokens,
            max_batch_size=config.max_batch_size,
            max_client_batch_size=config.max_client_batch_size,
            validation_workers=config.validation_workers,
            block_size=config.block_size,
            chat_template=chat.chat_template,
            tool_chat_template=chat.tool_chat_template,
            bos_token=chat.bos_token,
            eos_token=chat.eos_token,
            state=self.state,
            quantize=config.quantize,
        )
