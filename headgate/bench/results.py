"""What was measured: one JSON line per run, kept beside the page that is made of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from headgate.bench.contestants import Contestant
from headgate.bench.workload import Case


@dataclass(frozen=True, slots=True)
class Run:
    """One run of one workload against one server."""

    server: str
    kind: str  # of the weights
    workload: str
    concurrency: int
    requests: int
    round: int
    ready_seconds: float
    cpu_seconds: dict[str, float]  # by role of process
    peak_bytes: dict[str, int]  # by role of process, so far
    result: dict[str, Any]  # client.RunResult
    rooflines: list[dict[str, float]]  # of the machine, before and after it

    @property
    def case(self) -> tuple[str, int]:
        return self.workload, self.concurrency

    def roof(self, name: str) -> float:
        """The better of before and after, since disturbances only take from it; 0: not measured."""
        return max((roofline[name] for roofline in self.rooflines), default=0.0)

    def is_of(self, server: Contestant, number: int) -> bool:
        """Whether it is of a round of a server."""
        return (self.server, self.kind, self.round) == (server.name, server.kind, number)


@dataclass(frozen=True, slots=True)
class Session:
    """Everything that one command measured, or several that went on with one another."""

    machine: dict[str, Any]
    model: dict[str, Any]
    runs: list[Run] = field(default_factory=list)

    def save(self, path: Path) -> None:
        head = {"machine": self.machine, "model": self.model}
        lines = [head, *(asdict(run) for run in self.runs)]
        partial = path.with_name(f"{path.name}.part")
        partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path) -> Session:
        head, *runs = (json.loads(line) for line in path.read_text().splitlines())
        return cls(**head, runs=[Run(**run) for run in runs])

    def has(self, server: Contestant, number: int, plan: Iterable[Case]) -> bool:
        """Whether the round of a server is there with all of the plan, without errors."""
        found = {
            (*run.case, run.requests)
            for run in self.runs
            if run.is_of(server, number) and not run.result["errors"]
        }
        return found.issuperset(plan)

    def replace(self, server: Contestant, number: int, runs: Iterable[Run]) -> None:
        """The runs of a round of a server, in place of any that are there."""
        self.runs[:] = [run for run in self.runs if not run.is_of(server, number)]
        self.runs.extend(runs)

    def cases(self) -> list[tuple[str, int]]:
        return list(dict.fromkeys(run.case for run in self.runs))

    def servers(self, kind: str = "") -> list[tuple[str, str]]:
        """(server, kind), in the order in which they were measured."""
        found = dict.fromkeys((run.server, run.kind) for run in self.runs)
        return [entry for entry in found if not kind or entry[1] == kind]

    def servers_of(self, name: str) -> list[tuple[str, str]]:
        return [entry for entry in self.servers() if entry[0] == name]

    def of(self, server: str, kind: str, case: tuple[str, int]) -> list[Run]:
        return [
            run
            for run in self.runs
            if (run.server, run.kind, run.case) == (server, kind, case) and not run.result["errors"]
        ]

    def roofs(self, name: str) -> list[float]:
        """What all rooflines say of it; of memory and distance this changes where a host moves a
        virtual machine's cores together and apart."""
        return [roofline[name] for run in self.runs for roofline in run.rooflines]


def middle(values: Iterable[float]) -> float:
    """The median; 0 without values."""
    found = list(values)
    return median(found) if found else 0.0


def spread(values: Sequence[float]) -> float:
    """How far the values lie apart, as a share of their median."""
    centre = middle(values)
    return (max(values) - min(values)) / centre if len(values) > 1 and centre else 0.0
