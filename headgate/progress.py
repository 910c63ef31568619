"""How far a batch has come, on standard error: tqdm's bar where it is installed, else a line."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

_REDRAW_SECONDS = 0.2


def make_progress(wanted: bool | Callable[..., Any], total: int, title: str) -> Any:
    """Something with `update(n)` and `close()`. `wanted`: a truth, or a tqdm of one's own."""
    if not wanted:
        return _Silent()
    if callable(wanted):
        return wanted(total=total, desc=title)
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return _Line(total, title)
    return tqdm(total=total, desc=title, dynamic_ncols=True)


class _Silent:
    def update(self, n: int = 1) -> None: ...

    def close(self) -> None: ...


class _Line:
    """One line, drawn again and again on a terminal, once at the end elsewhere."""

    def __init__(self, total: int, title: str) -> None:
        self._total = total
        self._title = title
        self._done = 0
        self._started = time.monotonic()
        self._drawn = 0.0

    def update(self, n: int = 1) -> None:
        self._done += n
        if sys.stderr.isatty() and time.monotonic() - self._drawn >= _REDRAW_SECONDS:
            self._drawn = time.monotonic()
            print(f"\r{self._text()}", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        start = "\r" if sys.stderr.isatty() else ""
        print(start + self._text(), file=sys.stderr, flush=True)

    def _text(self) -> str:
        seconds = time.monotonic() - self._started
        rate = self._done / seconds if seconds else 0.0
        return f"{self._title}: {self._done} of {self._total}, {seconds:.1f} s, {rate:.2f} a second"
