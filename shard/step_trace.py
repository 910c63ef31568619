"""A line per step: when it began and ended, for finding out what lies between steps.

On where HEADGATE_STEP_TRACE names a file; `python -m headgate.bench.steps FILE` sums it up.
"""

from __future__ import annotations

from collections.abc import Mapping

from headgate.proto.messages import StepPlan


class StepTrace:
    """Writes `sequence rows tokens began ended` in nanoseconds of one clock, a line per step.

    Lines are kept and written in large pieces: a write lets other threads run before the next step,
    and that would be a gap of the trace's own.
    """

    def __init__(self, path: str) -> None:
        self._file = open(path, "w", buffering=1 << 20)  # noqa: SIM115 (closed by `close`)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str], rank: int) -> StepTrace | None:
        """The trace of this rank, or None where none is wanted: `.RANK` is appended to the name."""
        path = environment.get("HEADGATE_STEP_TRACE", "")
        return cls(f"{path}.{rank}") if path else None

    def note(self, plan: StepPlan, began: int, ended: int) -> None:
        line = f"{plan.sequence} {len(plan.rows)} {plan.num_tokens} {began} {ended}\n"
        self._file.write(line)

    def close(self) -> None:
        """Writes what is left."""
        self._file.close()
