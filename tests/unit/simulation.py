"""A scheduler and a fake shard on one bench, moved by hand: plan, deliver, lose, refuse."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from headgate.proto.messages import RowSampling, StepPlan
from headgate.router.beam_rows import BeamGroup
from headgate.router.beam_search import BeamParams, BeamSearch, Hypothesis
from headgate.router.request import Request
from headgate.router.scheduler import RowOutput, Scheduler, SchedulerConfig
from tests.unit.fake_shard import (
    FakeShard,
    expected_answer,
    expected_beams,
    expected_pooled,
    expected_prompt_logprobs,
)

VOCABULARY = 40
EOS = 0

DEFAULTS = SchedulerConfig(
    num_blocks=32,
    block_size=4,
    max_batch_prefill_tokens=16,
    kv_overcommit=0.5,
)


class Simulation:
    """Checks integrity after every operation, and each answer against what it should be."""

    def __init__(
        self, config: SchedulerConfig = DEFAULTS, *, spacing: float = 2.0, **changes: Any
    ) -> None:
        """spacing: seconds between arrivals; with fewer shorter prompts overtake longer ones."""
        self.config = replace(config, **changes)
        self.spacing = spacing
        self.scheduler = Scheduler(self.config)
        self.requests: list[Request] = []
        self.answers: dict[int, list[int]] = {}  # tokens as they came out, by request id
        self.prompt_logprobs: dict[int, list[float]] = {}
        self.pooled: dict[int, list[float]] = {}
        self.searches: dict[int, BeamParams] = {}  # by the id of the first row
        self.found: dict[int, Sequence[Hypothesis]] = {}
        self.plans: deque[StepPlan] = deque()  # sent, not delivered
        self.epoch = 0
        self.start_shard()

    def start_shard(self) -> None:
        self.epoch += 1
        self.shard = FakeShard(
            self.config.num_blocks,
            self.config.block_size,
            vocabulary=VOCABULARY,
            eos_id=EOS,
            max_tokens=self.config.max_batch_prefill_tokens,
            max_rows=self.config.max_batch_size,
            epoch=self.epoch,
        )
        self.sequence = 0
        self.plans.clear()

    # ------------------------------------------------------------ requests

    def add_samples(self, n: int, prompt: Sequence[int] | int, **fields: Any) -> list[Request]:
        """`n` answers to one prompt, as one request of a client's has them."""
        sampling = fields.pop("sampling", {})
        seed = sampling.pop("seed", len(self.requests))
        leader = self.add(prompt, sampling={**sampling, "seed": seed}, **fields)
        fields |= {"leader": leader, "arrival": leader.arrival, "skip_prefix_cache": False}
        samples = [leader]
        for index in range(1, n):
            own = {**sampling, "seed": seed, "sample_index": index, "prompt_logprobs": False}
            samples.append(self.add(leader.prompt_ids, sampling=own, **fields))
        return samples

    def add_beams(self, prompt: Sequence[int], params: BeamParams, **fields: Any) -> Request:
        """A beam search; `searches` has its params, `found` its outcome."""
        arrival = len(self.requests) * self.spacing
        rows = [
            Request(
                id=len(self.requests) + index,
                prompt_ids=prompt,
                sampling=RowSampling(
                    max_new_tokens=params.max_new_tokens,
                    ignore_eos=True,
                    top_n_tokens=params.num_candidates,
                ),
                arrival=arrival,
                **fields,
            )
            for index in range(params.width)
        ]
        BeamGroup.of(BeamSearch(params), rows)
        self.scheduler.add(rows[0])
        self.requests.extend(rows)
        self.searches[rows[0].id] = params
        self.scheduler.check_integrity()
        return rows[0]

    def add(
        self, prompt: Sequence[int] | int, new: int = 4, *, eos: bool = False, **fields: Any
    ) -> Request:
        """A request that runs to `new` tokens, or (`eos`) may end before."""
        number = len(self.requests)
        ids = (
            [(number * 7 + i) % 30 + 1 for i in range(prompt)]
            if isinstance(prompt, int)
            else prompt
        )
        sampling = fields.pop("sampling", {})
        request = Request(
            id=number,
            prompt_ids=ids,
            sampling=RowSampling(
                max_new_tokens=new, ignore_eos=not eos, **{"seed": number, **sampling}
            ),
            arrival=fields.pop("arrival", number * self.spacing),
            **fields,
        )
        self.scheduler.add(request)
        self.requests.append(request)
        self.answers[number] = list(request.output_ids)
        self.scheduler.check_integrity()
        return request

    def cancel(self, request: Request) -> bool:
        known = self.scheduler.cancel(request.id)
        self.scheduler.check_integrity()
        return known

    def expected(self, request: Request) -> list[int]:
        answer, _ = expected_answer(
            request.prompt_ids,
            request.sampling,
            vocabulary=VOCABULARY,
            eos_id=EOS,
            adapter_id=request.adapter_id,
        )
        return answer

    # ------------------------------------------------------------ steps

    def plan(self) -> StepPlan | None:
        """Schedules one step and sends it."""
        plan = self.scheduler.schedule(self.epoch, self.sequence + 1, now=float(self.sequence))
        self.scheduler.check_integrity()
        if plan is not None:
            self.sequence += 1
            self.plans.append(plan)
        return plan

    def deliver(self) -> list[RowOutput]:
        """Executes the oldest plan that was sent, and gives its result to the scheduler."""
        result = self.shard.execute(self.plans.popleft())
        outputs = self.scheduler.update(result)
        self.scheduler.check_integrity()
        for output in outputs:
            number = output.request.id
            if output.hypotheses:
                self.found[number] = output.hypotheses
            if output.token_id is not None:
                self.answers[number].append(output.token_id)
            if output.pooled is not None:
                self.pooled[number] = list(output.pooled)
            if output.prompt_logprobs is not None:
                known = self.prompt_logprobs.setdefault(number, [])
                assert output.prompt_logprobs.start == len(known) + 1
                known.extend(output.prompt_logprobs.logprobs)
        return outputs

    def step(self) -> StepPlan:
        """One plan, delivered at once."""
        plan = self.plan()
        assert plan is not None
        self.deliver()
        return plan

    def run(self, depth: int = 1, limit: int = 10_000) -> int:
        """Until all is answered; how many steps that took."""
        steps = 0
        while self.scheduler.has_work() or self.plans:
            while len(self.plans) < depth and self.plan() is not None:
                pass
            self.deliver()
            steps += 1
            assert steps < limit, "it goes on for ever"
        return steps

    def lose_shards(self) -> None:
        self.scheduler.reset()
        self.start_shard()
        self.scheduler.check_integrity()

    # ------------------------------------------------------------ the end

    def check_answers(self) -> None:
        """Each request that was not cancelled has the tokens it would have had alone."""
        for number, params in self.searches.items():
            leader = self.requests[number]
            if leader.finish_reason == "beams":
                assert self.found[number] == expected_beams(
                    leader.prompt_ids, params, vocabulary=VOCABULARY, adapter_id=leader.adapter_id
                )
        for request in self.requests:
            assert request.is_finished
            if request.finish_reason == "pooled":
                pooling = request.sampling.pooling
                wanted = expected_pooled(request.prompt_ids, pooling, request.adapter_id)
                assert self.pooled[request.id] == wanted
            if request.finish_reason == "pooled" or request.beams is not None:
                continue
            expected = self.expected(request)
            answer = self.answers[request.id]
            assert answer == request.output_ids
            if request.finish_reason in ("length", "eos", "stop_token"):
                assert answer == expected
                if request.sampling.prompt_logprobs:
                    wanted = expected_prompt_logprobs(request.prompt_ids, request.adapter_id)
                    assert self.prompt_logprobs.get(request.id, []) == wanted
            else:
                assert answer == expected[: len(answer)]
        stats = self.scheduler.stats
        assert stats.blocks_used == 0
        assert stats.blocks_free + stats.blocks_cached == self.config.num_blocks


def counts(plan: StepPlan | None) -> dict[int, int]:
    """Tokens by row id."""
    assert plan is not None
    return dict(zip(plan.rows, plan.counts, strict=True))
