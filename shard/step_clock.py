"""StepClock: how long a step took, for its result."""

from __future__ import annotations

import time
from dataclasses import replace

from headgate.proto.messages import StepResult


class StepClock:
    """A step's answer so far, and when it began."""

    def __init__(self, answer: StepResult, started: int) -> None:
        self.answer = answer
        self._started = started
        self._forward = time.perf_counter_ns()

    def stopped(self, before: int) -> StepResult:
        """before: when the step before was done, until when this one waited for the device."""
        done = time.perf_counter_ns()
        forward = done - max(self._forward, before)
        return replace(self.answer, forward_ns=forward, total_ns=done - max(self._started, before))
