"""Routes that take bodies of several APIs, told apart by a key that only one of them has."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from headgate.router.gateway.exchange import Exchange

Handler = Callable[[Exchange], Awaitable[None]]


class ByKeys:
    """Hands a request to the first handler whose key its body has, else to the first of all."""

    def __init__(self, payload_limit: int, handlers: Mapping[str, Handler]) -> None:
        self._payload_limit = payload_limit
        self._handlers = handlers

    async def __call__(self, exchange: Exchange) -> None:
        body = await exchange.read_raw(self._payload_limit)
        keys = body if isinstance(body, dict) else {}
        chosen = next((key for key in self._handlers if keys.get(key) is not None), None)
        await self._handlers[chosen or next(iter(self._handlers))](exchange)
