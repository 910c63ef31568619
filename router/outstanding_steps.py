"""The plans whose results are not back, in the order in which they were made."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat

from headgate.proto.messages import StepResult
from headgate.router.request import Request, RequestStatus
from headgate.router.row_output import ProtocolError

# A request, tokens to compute, guessed ones beside them at most, its KV positions after the first
# (as it was planned: guesses of steps before may have brought it further), and whether it then
# samples a token.
PlannedRow = tuple[Request, int, int, int, bool]
# Where a row's tokens are in a result: the first, and how many there are.
Place = tuple[int, int]


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
        return sum(count for _, count, *_ in self.rows)

    def places(self, result: StepResult) -> Iterable[Place]:
        """For each row the place of its tokens in the result.

        Raises ProtocolError for a result that is not this plan's.
        """
        plain = all(samples and request.beams is None for request, _, _, _, samples in self.rows)
        if plain and result.rows == self.row_ids:
            return zip(range(len(self.rows)), repeat(1))
        return self._find_rows(result)

    def _find_rows(self, result: StepResult) -> list[Place]:
        sampled, places, place = result.rows, [], 0
        for request, _, guesses, _, samples in self.rows:
            first = place
            while place < len(sampled) and sampled[place] == request.id:
                place += 1
            found = place - first
            if found > 1 and any(result.ends[first : place - 1]):
                raise ProtocolError(f"a token of request {request.id} after its end")
            if found > samples + guesses:
                raise ProtocolError(
                    f"{found} tokens for request {request.id} in step {self.sequence}"
                )
            if found and request.beams is not None and not result.top:
                raise ProtocolError(
                    f"no alternatives for beam {request.id} in step {self.sequence}"
                )
            if samples and not found and request.status is not RequestStatus.FINISHED:
                raise ProtocolError(f"no token for request {request.id} in step {self.sequence}")
            places.append((first, found))
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
            for request, *_ in step.rows:
                request.in_flight = request.drafts_in_flight = 0
        self._steps.clear()

    def in_flight(self) -> Counter[Request]:
        """How many of them each request is in."""
        return Counter(request for step in self._steps for request, *_ in step.rows)

    def drafts_in_flight(self) -> Counter[Request]:
        """How many guessed tokens they may compute of each request."""
        found: Counter[Request] = Counter()
        for step in self._steps:
            for request, _, guesses, *_ in step.rows:
                found[request] += guesses
        return found
