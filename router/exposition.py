"""Counters, gauges, histograms and summaries, written in Prometheus' text format.

Names are written as they are: the usual client library appends `_total` to counters,
which would break dashboards made for TGI. Not thread-safe: the router's loop owns them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter as Tally
from collections.abc import Iterator, Sequence
from itertools import accumulate

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
QUANTILES = (0.0, 0.5, 0.9, 0.95, 0.99, 0.999, 1.0)  # of summaries


class Series:
    """One metric with one set of label values."""

    def lines(self, name: str, labels: str) -> Iterator[str]:
        """Sample lines; `labels` is `key="value",...` without braces."""
        raise NotImplementedError


class Value(Series):
    """A counter or a gauge."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float = 0

    def inc(self, amount: float = 1) -> None:
        self.value += amount

    def set(self, value: float) -> None:
        self.value = value

    def lines(self, name: str, labels: str) -> Iterator[str]:
        yield f"{name}{_braces(labels)} {_number(self.value)}"


class Histogram(Series):
    """Observations counted by upper bound."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = list(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def lines(self, name: str, labels: str) -> Iterator[str]:
        prefix = f"{labels}," if labels else ""
        totals = list(accumulate(self._counts))
        for bound, total in zip([*map(_number, self._bounds), "+Inf"], totals, strict=True):
            yield f'{name}_bucket{{{prefix}le="{bound}"}} {total}'
        yield from _sum_and_count(name, labels, self._sum, totals[-1])


class Summary(Series):
    """Observations of few distinct values, with their quantiles since the start."""

    __slots__ = ("_tally",)

    def __init__(self) -> None:
        self._tally: Tally[float] = Tally()

    def observe(self, value: float, times: int = 1) -> None:
        self._tally[value] += times

    def lines(self, name: str, labels: str) -> Iterator[str]:
        prefix = f"{labels}," if labels else ""
        values = sorted(self._tally)
        totals = list(accumulate(self._tally[value] for value in values))
        count = totals[-1] if totals else 0
        for quantile in QUANTILES:
            place = bisect_left(totals, quantile * count)
            value = values[place] if values else 0
            yield f'{name}{{{prefix}quantile="{_number(quantile)}"}} {_number(value)}'
        total = sum(value * times for value, times in self._tally.items())
        yield from _sum_and_count(name, labels, total, count)


class Family:
    """One metric with all its label values."""

    def __init__(self, name: str, kind: str, help_text: str, series: dict[str, Series]) -> None:
        """`kind`: counter, gauge, histogram or summary; `series` by label text."""
        self._head = f"# HELP {name} {_escape(help_text)}\n# TYPE {name} {kind}"
        self._name = name
        self.series = series

    def lines(self) -> Iterator[str]:
        yield self._head
        for labels, series in self.series.items():
            yield from series.lines(self._name, labels)


def label_text(names: Sequence[str], values: Sequence[str]) -> str:
    """`key="value",...` with values escaped."""
    pairs = zip(names, values, strict=True)
    return ",".join(f'{name}="{_escape(value)}"' for name, value in pairs)


def render(families: Sequence[Family]) -> bytes:
    return ("\n".join(line for family in families for line in family.lines()) + "\n").encode()


def _sum_and_count(name: str, labels: str, total: float, count: int) -> Iterator[str]:
    yield f"{name}_sum{_braces(labels)} {_number(total)}"
    yield f"{name}_count{_braces(labels)} {count}"


def _braces(labels: str) -> str:
    return f"{{{labels}}}" if labels else ""


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
