"""The output items of a response as they grow, and the events that tell of it.

Events are dicts without their sequence numbers, in OpenAI's order. Whole responses are made by the
same steps, their events left unread.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from typing import Any

import orjson

from headgate.router.gateway.parsers.deltas import (
    CallArguments,
    CallBroken,
    CallEnd,
    CallStart,
    Content,
    Delta,
    Reasoning,
)

Event = dict[str, Any]
Logprobs = list[orjson.Fragment]


def new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


class OutputItems:
    """Messages, reasoning and function calls of one response; the last may be open."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._open = False  # the last item is not complete
        self._events: list[Event] = []

    def add(self, deltas: Iterable[Delta], logprobs: Logprobs) -> list[Event]:
        """`logprobs`: of the tokens that brought the deltas; they go with what is shown."""
        self._events = []
        for delta in deltas:
            if isinstance(delta, Content):
                self._add_text(delta.text, logprobs)
                logprobs = []
            elif isinstance(delta, Reasoning):
                self._add_reasoning(delta.text)
            elif isinstance(delta, CallStart):
                self._begin(
                    "fc", type="function_call", call_id=delta.id, name=delta.name, arguments=""
                )
            elif isinstance(delta, CallArguments):
                self.items[-1]["arguments"] += delta.text
                self._tell("response.function_call_arguments.delta", delta=delta.text)
            elif isinstance(delta, CallEnd):
                self._end("completed")
            elif isinstance(delta, CallBroken):  # what has been told cannot be taken back
                self._end("incomplete")
                self._add_text(delta.text, [])
        return self._events

    def finish(self, truncated: bool) -> list[Event]:
        """Ends the last item. A response without any gets an empty message."""
        self._events = []
        if not self.items:
            self._add_text("", [])
        self._end("incomplete" if truncated else "completed")
        return self._events

    def _add_text(self, text: str, logprobs: Logprobs) -> None:
        if not self._is_open("message"):
            self._begin("msg", type="message", role="assistant", content=[])
            part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": []}
            self._add_part({**part, "logprobs": []})
        part = self.items[-1]["content"][0]
        part["text"] += text
        part["logprobs"] += logprobs
        if text:
            self._tell_part("response.output_text.delta", delta=text, logprobs=logprobs)

    def _add_reasoning(self, text: str) -> None:
        if not self._is_open("reasoning"):
            self._begin("rs", type="reasoning", summary=[], content=[])
            self._add_part({"type": "reasoning_text", "text": ""})
        self.items[-1]["content"][0]["text"] += text
        self._tell_part("response.reasoning_text.delta", delta=text)

    def _is_open(self, kind: str) -> bool:
        return self._open and self.items[-1]["type"] == kind

    def _begin(self, prefix: str, **fields: Any) -> None:
        self._end("completed")
        self._open = True
        item = {"id": new_id(prefix), "status": "in_progress", **fields}
        self.items.append(item)
        self._tell_item("response.output_item.added", item)

    def _add_part(self, part: dict[str, Any]) -> None:
        self._tell_part("response.content_part.added", part=dict(part))
        self.items[-1]["content"].append(part)

    def _end(self, status: str) -> None:
        if not self._open:
            return
        self._open = False
        item = self.items[-1]
        item["status"] = status
        if item["type"] == "function_call":
            self._tell("response.function_call_arguments.done", arguments=item["arguments"])
        else:
            part = item["content"][0]
            if item["type"] == "message":
                self._tell_part(
                    "response.output_text.done", text=part["text"], logprobs=part["logprobs"]
                )
            else:
                self._tell_part("response.reasoning_text.done", text=part["text"])
            self._tell_part("response.content_part.done", part=dict(part))
        self._tell_item("response.output_item.done", item)

    def _tell_item(self, kind: str, item: dict[str, Any]) -> None:
        shown = {**item, "content": list(item["content"])} if "content" in item else dict(item)
        self._events.append({"type": kind, "output_index": len(self.items) - 1, "item": shown})

    def _tell_part(self, kind: str, **fields: Any) -> None:
        self._tell(kind, content_index=0, **fields)

    def _tell(self, kind: str, **fields: Any) -> None:
        place = {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}
        self._events.append({"type": kind, **place, **fields})
