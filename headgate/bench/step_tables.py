"""The steps that step_profile.py measures, and the Markdown tables it prints of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Case:
    """A step of `rows` rows computing `count` tokens each, up to position `context`."""

    rows: int
    count: int
    context: int

    @property
    def name(self) -> str:
        if self.count == 1:
            who = "1 row decodes" if self.rows == 1 else f"{self.rows} rows decode"
            return f"{who} at {self.context} positions"
        if self.count == self.context:
            return f"a prompt of {self.count} tokens"
        return f"a chunk of {self.count} tokens up to position {self.context}"


@dataclass(slots=True)
class Line:
    """Calls of one kind in a step."""

    calls: int = 0
    microseconds: float = 0.0
    floor: float = 0.0


@dataclass(frozen=True, slots=True)
class Step:
    """What a step of a case took."""

    milliseconds: float
    lines: Mapping[str, Line]  # by kind of call

    @property
    def floor(self) -> float:
        """Milliseconds."""
        return sum(line.floor for line in self.lines.values()) / 1e3

    def part(self, beginning: str) -> float:
        """Milliseconds of the calls whose kinds begin so."""
        found = (line for kind, line in self.lines.items() if kind.startswith(beginning))
        return sum(line.microseconds for line in found) / 1e3


# Whose calls are shown one by one.
CASES = (
    Case(1, 1, 200),
    Case(8, 1, 200),
    Case(32, 1, 200),
    Case(128, 1, 60),
    Case(1, 1, 1500),
    Case(1, 128, 128),
    Case(1, 256, 1500),
)
# What a step's cost grows with.
GROWTH = {
    "rows that decode": [Case(rows, 1, 200) for rows in (1, 2, 4, 8, 16, 32, 64, 128)],
    "the context of a row": [Case(1, 1, context) for context in (50, 200, 500, 1000, 1900)],
    "the contexts of 32 rows": [Case(32, 1, context) for context in (50, 200, 500, 1000)],
    "a prompt's length": [Case(1, count, count) for count in (16, 32, 64, 128, 256, 512)],
}


def calls_table(case: Case, step: Step) -> Iterator[str]:
    """A step call by call, against its floor."""
    yield f"### {case.name[0].upper()}{case.name[1:]}: {step.milliseconds:.2f} ms\n"
    yield "| calls | kind | ms | share | floor, ms | of the floor |"
    yield "|---|---|---|---|---|---|"
    whole = step.milliseconds * 1e3
    for name, line in sorted(step.lines.items(), key=lambda item: -item[1].microseconds):
        best = f"{line.floor / 1e3:.2f} | {line.floor / line.microseconds:.0%}"
        yield (
            f"| {line.calls} | {name} | {line.microseconds / 1e3:.2f} "
            f"| {line.microseconds / whole:.1%} | {best if line.floor else '|'} |"
        )
    rest = whole - step.part("") * 1e3
    yield f"| | Python: inputs, sampling, bookkeeping | {rest / 1e3:.2f} | {rest / whole:.1%} | | |"
    yield f"| | all | {step.milliseconds:.2f} | | {step.floor:.2f} | {_of_floor(step)} |\n"


def growth_table(title: str, steps: Iterable[tuple[Case, Step]]) -> Iterator[str]:
    """How a step's cost grows; times in milliseconds."""
    yield f"### With {title}\n"
    columns = ["step", "ms", "ms a token", "products", "attention", "sums of shards", "other calls"]
    columns += ["Python", "floor", "of the floor"]
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    for case, step in steps:
        within = step.part("")
        products = step.part("linear") + step.part("gated mlp")
        known = [products, step.part("paged attention"), step.part("shared")]
        parts = (*known, within - sum(known), step.milliseconds - within, step.floor)
        each = step.milliseconds / (case.rows * case.count)
        shown = " | ".join(f"{part:.2f}" for part in (step.milliseconds, each, *parts))
        yield f"| {case.name} | {shown} | {_of_floor(step)} |"
    yield ""


def kinds_table(steps: Mapping[str, Mapping[Case, Step]]) -> Iterator[str]:
    """All cases, side by side for each kind of weights."""
    yield "## Milliseconds of a step, and what they are of its floor, by kind of weights\n"
    yield "| step | " + " | ".join(steps) + " |"
    yield "|---|" + "---|" * len(steps)
    for case in dict.fromkeys(case for found in steps.values() for case in found):
        cells = [
            f"{found[case].milliseconds:.2f}, {_of_floor(found[case])}" for found in steps.values()
        ]
        yield f"| {case.name} | " + " | ".join(cells) + " |"
    yield ""


def _of_floor(step: Step) -> str:
    return f"{step.floor / step.milliseconds:.0%}"
