"""A workload on a server that only multiplies and reads, at given rates.

Headgate's own scheduler plans the steps, on a clock of its own that each step moves on by what its
arithmetic or its reading takes, whichever is longer. So a loop of clients is as it is: prompts come
when answers end, newcomers wait for the step under way, rows become few at the end of a run. What
is left out are threads, processes, exponentials, and everything else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from headgate.bench.client import percentile
from headgate.proto.messages import RowEnd, RowSampling, StepPlan, StepResult
from headgate.router.request import Request
from headgate.router.scheduler import Scheduler
from headgate.router.scheduler_config import SchedulerConfig


@dataclass(frozen=True, slots=True)
class StepDemand:
    """What steps of a model ask for."""

    num_layers: int
    layer_flops: float  # of a token, in the products of all layers
    head_flops: float  # of a token that is sampled after
    attention_flops: float  # of a query and a key, over all heads and layers
    weight_bytes: float  # read in every step
    kv_bytes: float  # of a position's keys and values


@dataclass(frozen=True, slots=True)
class Rates:
    """A second, over all cores."""

    products: float  # floating-point or whole-number operations
    head: float
    attention: float
    memory: float  # bytes read
    others: float = 0.0  # share of all cores' time that other programs take


@dataclass(frozen=True, slots=True)
class IdealRun:
    """What clients saw of it."""

    output_tokens_per_s: float
    ttft_p50: float  # milliseconds
    steps: int


@dataclass(slots=True)
class _Row:
    request: Request
    position: int = 0  # computed so far
    answered: int = 0  # tokens


class IdealServer:
    """Serves one loop of clients, each of whom asks again when its answer has ended."""

    def __init__(
        self, config: SchedulerConfig, demand: StepDemand, rates: Rates, right: float = 1.0
    ) -> None:
        """`right`: the share of guessed tokens that the model says too; all that a step has room
        for are guessed."""
        self._scheduler = Scheduler(config)
        self._demand = demand
        self._rates = rates
        self._right = right
        self._block_size = config.block_size
        self._rows: dict[int, _Row] = {}
        self._clock = 0.0
        self._owed = 0.0  # guesses that are to be right, less than one

    def run(
        self,
        prompts: Sequence[tuple[Sequence[int], int]],
        concurrency: int,
        round_trip: float = 0.0,
    ) -> IdealRun:
        """`prompts`: (token ids, tokens to answer with), in the order in which they are asked.
        `round_trip`: seconds from a step's end to a client and back, which no step waits for."""
        unasked = deque(
            Request(number, prompt, RowSampling(max_new_tokens=answer))
            for number, (prompt, answer) in enumerate(prompts, 1)
        )
        on_its_way: deque[Request] = deque()  # in order of arrival
        firsts: list[float] = []
        steps, num_asking = 0, concurrency
        while True:
            for _ in range(min(num_asking, len(unasked))):
                on_its_way.append(unasked.popleft())
                on_its_way[-1].arrival = self._clock + round_trip * (steps > 0)
            if not self._scheduler.has_work():
                if not on_its_way:
                    break
                self._clock = max(self._clock, on_its_way[0].arrival)
            while on_its_way and on_its_way[0].arrival <= self._clock:
                request = on_its_way.popleft()
                self._rows[request.id] = _Row(request)
                self._scheduler.add(request)
            steps += 1
            result = self._step(steps)
            for row_id in dict.fromkeys(result.rows):
                row = self._rows[row_id]
                if row.answered == result.rows.count(row_id):
                    firsts.append(self._clock - row.request.arrival + round_trip)
            num_asking = sum(end is not RowEnd.NONE for end in result.ends)
        tokens = sum(answer for _, answer in prompts)
        return IdealRun(tokens / self._clock, percentile(firsts, 0.5) * 1e3, steps)

    def _step(self, sequence: int) -> StepResult:
        plan = self._scheduler.schedule(1, sequence, self._clock)
        assert plan is not None  # no result is outstanding, so there is always something to do
        for new in plan.new_rows:
            self._rows[new.id].position = new.num_computed_tokens
        tokens, samples, pairs = 0, 0, 0  # pairs of queries and keys
        blocks: set[int] = set()
        answers: list[tuple[int, int]] = []  # (row, its tokens)
        for row_id, count, guesses in zip(plan.rows, plan.counts, _guesses(plan), strict=True):
            row = self._rows[row_id]
            computed = count + guesses
            tokens += computed
            pairs += sum(range(row.position + 1, row.position + computed + 1))
            row.position += count
            blocks.update(row.request.block_ids[: -(-row.position // self._block_size)])
            if row.position == len(row.request.prompt_ids) + row.answered:
                samples += 1 + guesses
                right = self._right_of(guesses)
                row.position += right
                row.answered += 1 + right
                answers.append((row_id, 1 + right))
        self._clock += self._seconds(tokens, samples, pairs, len(blocks) * self._block_size)
        result = self._result(plan, answers)
        self._scheduler.update(result)
        return result

    def _right_of(self, guesses: int) -> int:
        self._owed += guesses * self._right
        right = min(guesses, int(self._owed + 1e-9))
        self._owed -= right
        return right

    def _seconds(self, tokens: int, samples: int, pairs: int, positions: int) -> float:
        demand, rates = self._demand, self._rates
        # Of a prompt's other tokens the last layer is not needed, but for their keys and values.
        whole = samples + (tokens - samples) * (1 - 1 / demand.num_layers)
        arithmetic = (
            whole * demand.layer_flops / rates.products
            + samples * demand.head_flops / rates.head
            + pairs * demand.attention_flops * (whole / tokens) / rates.attention
        )
        reading = (demand.weight_bytes + positions * demand.kv_bytes) / rates.memory
        return max(arithmetic, reading) / (1 - rates.others)

    def _result(self, plan: StepPlan, answers: Sequence[tuple[int, int]]) -> StepResult:
        rows, ends = [], []
        for row_id, count in answers:
            row = self._rows[row_id]
            rows += [row_id] * count
            done = row.answered == row.request.sampling.max_new_tokens
            ends += [RowEnd.NONE] * (count - 1) + [RowEnd.LENGTH if done else RowEnd.NONE]
        tokens, logprobs = [1] * len(rows), [0.0] * len(rows)
        return StepResult(
            plan.epoch, plan.sequence, rows=rows, token_ids=tokens, logprobs=logprobs, ends=ends
        )


def _guesses(plan: StepPlan) -> list[int]:
    """Of each row, if every row finds as many as it may: the first in order first, as shards do."""
    left = plan.most_drafts
    found = []
    for wanted in plan.drafts or [0] * len(plan.rows):
        found.append(min(wanted, left))
        left -= found[-1]
    return found
