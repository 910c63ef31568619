"""Places that several threads share, taken and given back some at a time."""

from __future__ import annotations

import threading


class Room:
    """`size` places in all."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._free = size
        self._changed = threading.Condition()

    def take(self, count: int, *, wait: bool) -> bool:
        """Takes `count` places, all at once; more than there are count as all there are.

        False, and nothing taken, if they are not free and `wait` is False.
        """
        count = min(count, self._size)
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self._free >= count)
            elif self._free < count:
                return False
            self._free -= count
            return True

    def give_back(self, count: int) -> None:
        """What a `take` of as many took."""
        with self._changed:
            self._free += min(count, self._size)
            self._changed.notify_all()
