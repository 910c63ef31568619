"""Chat answers that hold more than text: reasoning and tool calls in OpenAI's shapes.

Answers without a parser go by openai_chat.py's shorter way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import orjson

from headgate.proto import router_pb2
from headgate.router.gateway.openai_common import finish_reason
from headgate.router.gateway.parsers.deltas import (
    CallArguments,
    CallBroken,
    CallEnd,
    CallStart,
    Content,
    Delta,
    ParsedAnswer,
    Parser,
    Reasoning,
)
from headgate.router.gateway.token import Token

TokenLogprobs = Callable[[Sequence[Token]], bytes]


def truncated(finished: router_pb2.Finished) -> bool:
    return finished.reason == router_pb2.FINISH_REASON_LENGTH


def parsed_message(parser: Parser, finished: router_pb2.Finished) -> tuple[bytes, bytes]:
    """The `message` of a whole answer, and its `finish_reason`, as JSON."""
    answer = ParsedAnswer.of(parser, finished.generated_text, truncated(finished))
    return orjson.dumps(message_of(answer)), parsed_reason(finished, called=bool(answer.calls))


def message_of(answer: ParsedAnswer) -> dict[str, Any]:
    """OpenAI's `message`."""
    message: dict[str, Any] = {"role": "assistant", "content": answer.content}
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
        message["content"] = answer.content or None
    if answer.calls:
        message["content"] = answer.content or None
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in answer.calls
        ]
    return message


def parsed_reason(finished: router_pb2.Finished, *, called: bool) -> bytes:
    if called and not truncated(finished):
        return b'"tool_calls"'
    return finish_reason(finished)


class ParsedDeltas:
    """The chunks of one streamed answer: one for each delta, the role in the first only."""

    def __init__(self, parser: Parser, before: bytes, logprobs: TokenLogprobs | None) -> None:
        """`before`: a chunk up to its `delta`. `logprobs`: None where none are wanted."""
        self._parser = parser
        self._before = before
        self._logprobs = logprobs
        self._role: dict[str, Any] = {"role": "assistant"}
        self._calls = 0

    def token(self, token: Token, text: str) -> bytes:
        return self._chunks(self._parser.feed(text), token)

    def last(self, token: Token | None, text: str, finished: router_pb2.Finished) -> bytes:
        deltas = self._parser.feed(text) + self._parser.finish(truncated(finished))
        chunks = self._chunks(deltas, token)
        reason = parsed_reason(finished, called=self._calls > 0)
        return chunks + self._chunk({}, b"null", reason)

    def _chunks(self, deltas: Sequence[Delta], token: Token | None) -> bytes:
        """The token's logprobs go with its first chunk, which is empty where it brought nothing."""
        bodies = [body for delta in deltas if (body := self._body(delta)) is not None]
        logprobs = b"null"
        if self._logprobs is not None and token is not None:
            logprobs = self._logprobs((token,))
            bodies = bodies or [{}]
        chunks = []
        for body in bodies:
            chunks.append(self._chunk(body, logprobs, b"null"))
            logprobs = b"null"
        return b"".join(chunks)

    def _body(self, delta: Delta) -> dict[str, Any] | None:
        if isinstance(delta, Content):
            return {"content": delta.text}
        if isinstance(delta, Reasoning):
            return {"reasoning_content": delta.text}
        if isinstance(delta, CallStart):
            self._calls += 1
            function = {"name": delta.name, "arguments": ""}
            call = {"index": delta.index, "id": delta.id, "type": "function", "function": function}
            return {"tool_calls": [call]}
        if isinstance(delta, CallArguments):
            call = {"index": delta.index, "function": {"arguments": delta.text}}
            return {"tool_calls": [call]}
        if isinstance(delta, CallBroken):  # what has been sent cannot be taken back
            self._calls -= 1
            return {"content": delta.text}
        assert isinstance(delta, CallEnd)
        return None

    def _chunk(self, delta: dict[str, Any], logprobs: bytes, reason: bytes) -> bytes:
        role, self._role = self._role, {}
        return b'%s%s,"logprobs":%s,"finish_reason":%s}],"usage":null}\n\n' % (
            self._before,
            orjson.dumps(role | delta),
            logprobs,
            reason,
        )
