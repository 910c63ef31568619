"""How often a process may die, and how long to wait before its next try and for its start."""

from __future__ import annotations

FIRST_DELAY = 0.2  # seconds
LONGEST_DELAY = 10.0
DEATHS = 5
STABLE_SECONDS = 60.0  # what served this long has proved its health
START_MARGIN = 30.0  # seconds that any start may take


def start_limit(limit: float, slowest: float, deaths: int) -> float:
    """Seconds until a start counts as hung: `limit`, less once it is known how long one takes.

    `slowest`: seconds of the slowest start so far, 0 if there was none. Doubles with every further
    death in a row, since the machine may have become slow.
    """
    if not slowest:
        return limit
    return min(limit, (START_MARGIN + 5 * slowest) * 2 ** max(deaths - 1, 0))


class RestartPolicy:
    """Counts deaths since the last proof of health; delays double from one to the next."""

    def __init__(
        self, *, deaths: int = DEATHS, first: float = FIRST_DELAY, longest: float = LONGEST_DELAY
    ) -> None:
        self.deaths = 0
        self._limit = deaths
        self._first = first
        self._longest = longest

    def death(self, served: float) -> float | None:
        """Counts one, after it served for some seconds.

        Returns the seconds to wait before the next try; None: it has died too often.
        """
        if served >= STABLE_SECONDS:
            self.deaths = 0
        self.deaths += 1
        if self.deaths >= self._limit:
            return None
        return min(self._longest, self._first * 2 ** (self.deaths - 1))

    def reset(self) -> None:
        """It has done its work: former deaths don't count."""
        self.deaths = 0
