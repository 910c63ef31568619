"""Tokens of many requests as columns: what most events of a step are, at a fraction of their cost.

An event of its own is a message in a message in a message, some microseconds of Python at either
end. `TokenColumns` in router.proto carries one entry of each column per token, and says which
tokens may travel so.
"""

from __future__ import annotations

import math
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence

from headgate.proto import router_pb2
from headgate.proto.messages import pack_floats, pack_ids, unpack_floats, unpack_ids

NO_LOGPROB = math.nan
# key, attempt, index of the answer, place of the token in it, text offset, id, logprob, text
Row = tuple[int, int, int, int, int, int, float, str]


def encode_columns(rows: Sequence[Row]) -> router_pb2.TokenColumns:
    if not rows:
        return router_pb2.TokenColumns()
    keys, attempts, indices, positions, text_offsets, ids, logprobs, texts = zip(*rows, strict=True)
    return router_pb2.TokenColumns(
        keys=_pack_keys(keys),
        attempts=pack_ids(attempts),
        indices=pack_ids(indices),
        positions=pack_ids(positions),
        text_offsets=pack_ids(text_offsets),
        ids=pack_ids(ids),
        logprobs=pack_floats(logprobs),
        texts=texts,
    )


def decode_columns(message: router_pb2.TokenColumns) -> Iterator[Row]:
    """The tokens in order. Raises ValueError where the columns differ in length."""
    return zip(
        _unpack_keys(message.keys),
        unpack_ids(message.attempts),
        unpack_ids(message.indices),
        unpack_ids(message.positions),
        unpack_ids(message.text_offsets),
        unpack_ids(message.ids),
        unpack_floats(message.logprobs),
        message.texts,
        strict=True,
    )


def _pack_keys(keys: Iterable[int]) -> bytes:
    values = array("Q", keys)
    if sys.byteorder == "big":
        values.byteswap()
    return values.tobytes()


def _unpack_keys(data: bytes) -> list[int]:
    values = array("Q")
    values.frombytes(data)
    if sys.byteorder == "big":
        values.byteswap()
    return values.tolist()
