"""The events of a message to gateways, as tests look at them."""

from __future__ import annotations

from collections.abc import Iterator

from headgate.proto import router_pb2
from headgate.proto.token_columns import decode_columns


def all_events(message: router_pb2.ServerMessage) -> Iterator[router_pb2.KeyedEvent]:
    """All events of a message in their order, those that travelled as columns included."""
    for row in decode_columns(message.tokens):
        key, attempt, index, position, offset, id_, logprob, text = row
        tokens = router_pb2.Tokens(
            index=index,
            first_index=position,
            tokens=[_token(id_, logprob, text)],
            text=text,
            text_offset=offset,
        )
        event = router_pb2.GenerateEvent(tokens=tokens)
        yield router_pb2.KeyedEvent(key=key, attempt=attempt, event=event)
    yield from message.events


def _token(id_: int, logprob: float, text: str) -> router_pb2.Token:
    """A row's token as a message."""
    if logprob != logprob:  # NaN
        return router_pb2.Token(id=id_, text=text)
    return router_pb2.Token(id=id_, text=text, logprob=logprob)
