"""The scheduler against random lives: every answer is the one its request would have had alone."""

from __future__ import annotations

import random
from contextlib import suppress
from typing import Any

import pytest

from headgate.proto.messages import Pooling
from headgate.router import block_pool, scheduler
from headgate.router.beam_search import BeamParams, EarlyStopping
from headgate.router.request import Request
from headgate.router.scheduler_config import RequestTooLarge
from tests.unit.simulation import Simulation

EVENTS = 1500
SYSTEM_PROMPTS: tuple[list[int], ...] = ([], [1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 4, 9, 9, 9, 9])


def arrive(rng: random.Random, simulation: Simulation) -> None:
    """A request of any kind, small enough to fit alone; some go as one of the last ones went."""
    capacity = simulation.config.num_blocks * simulation.config.block_size
    sampling: dict[str, Any] = {}
    if simulation.requests and rng.random() < 0.4:
        twin = rng.choice(simulation.requests[-6:])
        prompt = [*twin.prompt_ids, *twin.output_ids[: rng.choice([0, 0, 2, 9])]]
        prompt += [rng.randrange(1, 5)] * rng.choice([0, 0, 1])
        sampling["seed"] = twin.sampling.seed
    else:
        prompt = [*rng.choice(SYSTEM_PROMPTS)]
        prompt += [rng.randrange(1, 5) for _ in range(rng.randrange(1, 14))]
    prompt = prompt[: capacity - 1]
    new = rng.randrange(1, min(40, capacity - len(prompt) + 2))
    if rng.random() < 0.15:
        arrive_beams(rng, simulation, prompt, min(new, 12))
        return
    whole = rng.random() < 0.1
    if rng.random() < 0.2:
        pooling = rng.choice([Pooling.MEAN, Pooling.LAST])
        simulation.add(
            prompt,
            1,
            adapter_id=rng.choice(["", "french"]),
            skip_prefix_cache=pooling is Pooling.MEAN,
            sampling={**sampling, "pooling": pooling},
        )
        return
    simulation.add_samples(
        rng.choice([1, 1, 1, 2, 5]),
        prompt,
        new=new,
        eos=rng.random() < 0.5,
        lockstep=rng.random() < 0.1,
        adapter_id=rng.choice(["", "", "", "french"]),
        skip_prefix_cache=whole,
        sampling={
            **sampling,
            "prompt_logprobs": whole,
            "stop_token_ids": (rng.randrange(40),) if rng.random() < 0.3 else (),
            "min_new_tokens": rng.choice([0, 0, min(3, new)]),
        },
    )


def arrive_beams(rng: random.Random, simulation: Simulation, prompt: list[int], new: int) -> None:
    """A beam search, if it is small enough to fit alone."""
    ends = frozenset(rng.sample(range(40), rng.choice([0, 1, 6])))
    params = BeamParams(
        width=rng.choice([2, 3, 4]),
        max_new_tokens=new,
        min_new_tokens=rng.choice([0, 0, min(2, new)]),
        length_penalty=rng.choice([1.0, 0.0, -0.5, 2.0]),
        early_stopping=rng.choice(list(EarlyStopping)),
        eos_ids=ends,
    )
    with suppress(RequestTooLarge):
        simulation.add_beams(prompt, params, adapter_id=rng.choice(["", "", "french"]))


def living(simulation: Simulation) -> list[Request]:
    return [
        request
        for request in simulation.requests
        if not request.is_finished and (request.beams is None or request.id in simulation.searches)
    ]


def live(rng: random.Random, simulation: Simulation, depth: int, trouble: float) -> None:
    """One thing that happens."""
    event = rng.random()
    if event < 0.13 and len(living(simulation)) < 25:
        arrive(rng, simulation)
    elif event < 0.14 and living(simulation):
        simulation.cancel(rng.choice(living(simulation)))
    elif event < 0.15 and living(simulation):
        simulation.scheduler.finish(rng.choice(living(simulation)).id, "stop_sequence")
        simulation.scheduler.check_integrity()
    elif event < 0.15 + trouble:
        if rng.random() < 0.5:
            simulation.lose_shards()
        else:
            simulation.shard.refuse = True
    elif event < 0.6 and len(simulation.plans) < depth:
        simulation.plan()
    elif simulation.plans:
        simulation.deliver()


@pytest.mark.parametrize("caching", [True, False], ids=["cache", "no_cache"])
@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("seed", range(4))
def test_random_lives(
    seed: int, depth: int, caching: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(f"{seed} {depth} {caching}")
    monkeypatch.setattr(scheduler, "DRAFT_SHARE", rng.choice([1, 1, 2, 8]))
    monkeypatch.setattr(block_pool, "_FEWEST_RUNS", rng.choice([64, 64, 4, 2]))
    simulation = Simulation(
        num_blocks=rng.choice([7, 10, 16, 30]),
        block_size=rng.choice([1, 2, 4, 4]),
        max_batch_prefill_tokens=rng.choice([1, 3, 8, 40, 40]),
        max_batch_size=rng.choice([0, 0, 2, 5]),
        kv_overcommit=rng.choice([0.0, 0.1, 0.5, 1.0, 1.0]),
        prefix_caching=caching,
        spacing=rng.choice([0.0, 0.005, 2.0]),
        draft_tokens=rng.choice([0, 0, 1, 3, 8]),
    )
    trouble = rng.choice([0.0, 0.005, 0.02])
    for _ in range(EVENTS):
        live(rng, simulation, depth, trouble)
    simulation.run(depth)
    simulation.check_answers()
    if simulation.config.kv_overcommit == 0:
        assert simulation.scheduler.stats.preemptions == 0


def test_a_crowd_in_a_quarter_of_the_memory() -> None:
    """200 requests of mixed lengths, memory promised four times over: all are answered in full."""
    rng = random.Random(7)
    simulation = Simulation(
        num_blocks=120, max_batch_prefill_tokens=128, max_batch_size=64, kv_overcommit=1.0
    )
    for _ in range(200):
        simulation.add(rng.randrange(1, 16), new=rng.randrange(5, 40))
    simulation.run(depth=2)
    stats = simulation.scheduler.stats
    assert stats.preemptions > 0
    # Preempted requests find most of what they had computed.
    tokens = sum(request.max_positions for request in simulation.requests)
    assert simulation.shard.tokens_computed < 1.5 * tokens
    simulation.check_answers()
