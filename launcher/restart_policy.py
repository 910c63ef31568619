"""How often a process may die before it is given up, and how long to wait before the next try."""

from __future__ import annotations

FIRST_DELAY = 0.2  # seconds
LONGEST_DELAY = 10.0
DEATHS = 5


class RestartPolicy:
    """Counts deaths since the last proof of health; delays double from one to the next."""

    def __init__(
        self, *, deaths: int = DEATHS, first: float = FIRST_DELAY, longest: float = LONGEST_DELAY
    ) -> None:
        self.deaths = 0
        self._limit = deaths
        self._first = first
        self._longest = longest

    def death(self) -> float | None:
        """Counts one. Returns the seconds to wait; None: it has died too often."""
        self.deaths += 1
        if self.deaths >= self._limit:
            return None
        return min(self._longest, self._first * 2 ** (self.deaths - 1))

    def reset(self) -> None:
        """It has done its work: former deaths don't count."""
        self.deaths = 0
