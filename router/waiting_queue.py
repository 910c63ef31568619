"""Requests that wait for their turn.

It has no bound: how many requests there may be, in all their states, is the engine's limit.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from headgate.router.request import Request


def _order(request: Request) -> tuple[float, int]:
    return request.order


class WaitingQueue:
    """In order of service (Request.order). A preempted request comes back to its place in it."""

    def __init__(self) -> None:
        self._requests: list[Request] = []  # sorted; moving pointers is cheap at this length

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    @property
    def head(self) -> Request:
        """The next to be served. Raises IndexError where there is none."""
        return self._requests[0]

    def add(self, request: Request) -> None:
        insort(self._requests, request, key=_order)

    def pop(self) -> Request:
        """Takes the head out."""
        return self._requests.pop(0)

    def remove(self, request: Request) -> None:
        """Takes out a request wherever it is. Raises ValueError for one that is not here."""
        index = bisect_left(self._requests, request.order, key=_order)
        if index == len(self._requests) or self._requests[index] is not request:
            raise ValueError(f"request {request.id} is not waiting")
        del self._requests[index]
