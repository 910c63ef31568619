"""`python -m headgate.bench.steps TRACE`: the gaps between the steps of a shard, as one JSON line.

A trace is what a shard writes where HEADGATE_STEP_TRACE is set. Counted are steps in which every
row computes one token and that follow such a step with as many rows: between others the shard may
have waited for work.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median


@dataclass(frozen=True, slots=True)
class TracedStep:
    """A line of a trace; times in nanoseconds."""

    sequence: int
    rows: int
    tokens: int
    began: int
    ended: int

    @property
    def is_decode(self) -> bool:
        return self.rows == self.tokens


def read_trace(path: Path) -> list[TracedStep]:
    """All steps of the file; a last line that is not whole is left out."""
    lines = path.read_text().splitlines(keepends=True)
    return [TracedStep(*map(int, line.split())) for line in lines if line.endswith("\n")]


def gaps(steps: list[TracedStep], rows: int) -> Iterator[tuple[int, int]]:
    """(nanoseconds between, nanoseconds of the step) for decode steps of at least `rows` rows."""
    for before, step in pairwise(steps):
        follows = step.sequence == before.sequence + 1 and step.rows == before.rows
        if follows and before.is_decode and step.is_decode and step.rows >= rows:
            yield step.began - before.ended, step.ended - step.began


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m headgate.bench.steps", description=__doc__)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--rows", type=int, default=32, help="least number of rows (default: 32)")
    arguments = parser.parse_args()
    found = list(gaps(read_trace(arguments.trace), arguments.rows))
    if not found:
        print(f"no decode steps of {arguments.rows} rows after one another", file=sys.stderr)
        return 1
    line = {
        "steps": len(found),
        "step_ms": round(median(step for _, step in found) / 1e6, 3),
        "gap_ms": round(median(gap for gap, _ in found) / 1e6, 4),
        "largest_gap_ms": round(max(gap for gap, _ in found) / 1e6, 3),
        "gap_share": round(sum(gap for gap, _ in found) / sum(step for _, step in found), 5),
    }
    print(json.dumps(line))
    return 0


if __name__ == "__main__":
    sys.exit(main())
