"""PendingStep: a step that was begun, whose result may still be on its way from the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from headgate.proto.messages import StepResult


class PendingStep:
    """`wait` may be called on any thread, the rest on the model's only."""

    def __init__(
        self, finish: Callable[[], StepResult], wait: Callable[[], object], queue: StepQueue
    ) -> None:
        """wait: until the device has done its part; finish: also the rest, called once."""
        self._result: StepResult | None = None
        self._finish = finish
        self._queue = queue
        self.wait = wait

    @classmethod
    def done(cls, result: StepResult) -> PendingStep:
        step = cls(lambda: result, _no_wait, _NO_QUEUE)
        step._result = result
        return step

    @property
    def is_done(self) -> bool:
        return self._result is not None

    def result(self) -> StepResult:
        """Settles this step and those before it."""
        if self._result is None:
            self._queue.settle_through(self)
        assert self._result is not None
        return self._result

    def settle(self) -> None:
        self._result = self._finish()

    def drop(self, nothing: StepResult) -> None:
        """Waits for it; its result is `nothing`."""
        self.wait()
        self._result = nothing


class StepQueue:
    """Steps that are begun and not settled, oldest first."""

    def __init__(self) -> None:
        self._steps: deque[PendingStep] = deque()

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, step: PendingStep) -> None:
        self._steps.append(step)

    def settle(self, leave: int = 0) -> None:
        """All but the youngest `leave`."""
        while len(self._steps) > leave:
            self._steps.popleft().settle()

    def settle_through(self, step: PendingStep) -> None:
        while not step.is_done:
            self._steps.popleft().settle()

    def drop(self, nothing: StepResult) -> None:
        """All."""
        while self._steps:
            self._steps.popleft().drop(nothing)


_NO_QUEUE = StepQueue()  # of steps that are done at once


def _no_wait() -> None:
    """Of a step that is done."""
