"""The plans whose results are not back, in the order in which they were made."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from headgate.proto.messages import StepResult
from headgate.router.request import Request, RequestStatus
from headgate.router.row_output import ProtocolError

# A request, tokens to compute, its KV positions after that, and whether it then samples a token.
PlannedRow = tuple[Request, int, int, bool]


@dataclass(frozen=True, slots=True)
class OutstandingStep:
    """A plan whose result is not back."""

    epoch: int
    sequence: int
    rows: list[PlannedRow]  # in batch order
    row_ids: Sequence[int]  # theirs
    forked: list[Request]  # those of them that begin with a copy of another's KV
    filled: list[int]  # blocks that it fills with known tokens, findable since it was made

    @property
    def num_tokens(self) -> int:
        return sum(count for _, count, _, _ in self.rows)

    def places(self, result: StepResult) -> Sequence[int]:
        """For each row its place in the result, -1 for one that sampled nothing.

        Raises ProtocolError for a result that is not this plan's.
        """
        plain = all(samples and request.beams is None for request, _, _, samples in self.rows)
        if plain and result.rows == self.row_ids:
            return range(len(self.rows))
        return self._find_rows(result)

    def _find_rows(self, result: StepResult) -> list[int]:
        sampled, places, place = result.rows, [], 0
        for request, _, _, samples in self.rows:
            if samples and place < len(sampled) and sampled[place] == request.id:
                if request.beams is not None and not result.top:
                    raise ProtocolError(
                        f"no alternatives for beam {request.id} in step {self.sequence}"
                    )
                places.append(place)
                place += 1
            elif samples and request.status is not RequestStatus.FINISHED:
                raise ProtocolError(f"no token for request {request.id} in step {self.sequence}")
            else:
                places.append(-1)
        if place != len(sampled):
            raise ProtocolError(f"step {self.sequence} has tokens of rows it did not plan")
        return places


class OutstandingSteps:
    """Answered strictly in order."""

    def __init__(self) -> None:
        self._steps: deque[OutstandingStep] = deque()

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[OutstandingStep]:
        return iter(self._steps)

    def add(self, step: OutstandingStep) -> None:
        self._steps.append(step)

    def find(self, epoch: int, sequence: int) -> OutstandingStep | None:
        """The oldest one if this is it; None for one that is void or unknown.

        Raises ProtocolError where an older one waits for its result.
        """
        for place, step in enumerate(self._steps):
            if (step.epoch, step.sequence) == (epoch, sequence):
                if place:
                    raise ProtocolError(f"step {sequence} was answered before the one before it")
                return step
        return None

    def answered(self) -> None:
        """The result of the oldest has been taken."""
        self._steps.popleft()

    def drop(self) -> None:
        """None of them will be answered."""
        for step in self._steps:
            for request, _, _, _ in step.rows:
                request.in_flight = 0
        self._steps.clear()

    def in_flight(self) -> Counter[Request]:
        """How many of them each request is in."""
        return Counter(request for step in self._steps for request, _, _, _ in step.rows)
