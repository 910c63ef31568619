"""A token as formatters see it: made and kept at a fraction of what a message costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from headgate.proto import router_pb2


class Token(NamedTuple):
    """The fields are those of Token in router.proto."""

    id: int
    text: str
    logprob: float | None
    special: bool = False
    top: Sequence[Token] = ()


def token_of(message: router_pb2.Token) -> Token:
    return Token(
        message.id,
        message.text,
        message.logprob if message.HasField("logprob") else None,
        message.special,
        tuple(map(token_of, message.top)),
    )
