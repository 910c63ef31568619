"""Beam searches in the scheduler: rows fork and die, and whatever happens the outcome stays."""

from __future__ import annotations

import random
from contextlib import suppress

import pytest

from headgate.router.beam_search import BeamParams
from headgate.router.request import RequestStatus
from headgate.router.scheduler_config import RequestTooLarge
from tests.unit.simulation import Simulation
from tests.unit.test_scheduler_random import arrive_beams, living

PROMPT = list(range(1, 11))  # two blocks of 4, and a half


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("length", [1, 8, 10])
def test_beams_share_what_they_have_in_common(length: int, depth: int) -> None:
    simulation = Simulation(num_blocks=64)
    params = BeamParams(width=4, max_new_tokens=8)
    leader = simulation.add_beams(PROMPT[:length], params)
    plain = simulation.add(3, new=20)
    simulation.run(depth)
    simulation.check_answers()
    assert len(simulation.found[leader.id]) == 4
    assert plain.finish_reason == "length"
    # The prompt once; of each beam all tokens but the last; no row is computed twice.
    assert simulation.shard.tokens_computed == length + 4 * 7 + 3 + 19


def test_a_row_that_goes_on_is_told_its_token_and_others_are_forks() -> None:
    simulation = Simulation()
    simulation.add_beams(PROMPT, BeamParams(width=3, max_new_tokens=4))
    simulation.step()
    plan = simulation.plan()
    assert plan is not None
    assert [row for row, _ in plan.choices] == [0]
    assert [fork.child for fork in plan.forks] == [1, 2]
    assert [(fork.num_tokens, len(fork.token_ids)) for fork in plan.forks] == [(10, 1)] * 2
    assert len(plan.copies) == 2
    assert simulation.plan() is None  # the round's results are needed first
    simulation.run()
    simulation.check_answers()


def test_a_search_has_its_rows_from_the_beginning() -> None:
    simulation = Simulation(max_batch_size=4)
    simulation.add_beams(PROMPT, BeamParams(width=3, max_new_tokens=4))
    others = [simulation.add(2, new=9) for _ in range(3)]
    simulation.step()
    assert [other.status for other in others] == [RequestStatus.RUNNING] + [
        RequestStatus.WAITING
    ] * 2
    simulation.run()
    simulation.check_answers()
    with pytest.raises(RequestTooLarge, match=r"<= 4, the rows of a step\. Given: 5") as refusal:
        simulation.add_beams([1], BeamParams(width=5, max_new_tokens=4))
    assert refusal.value.field == "beam_width"


def test_a_search_that_could_not_end_alone_is_refused() -> None:
    simulation = Simulation(num_blocks=11)
    simulation.add_beams([1], BeamParams(width=2, max_new_tokens=20))
    with pytest.raises(RequestTooLarge, match=r"`beam_width` must be <= 1: .* needs 6 KV") as wide:
        simulation.add_beams([1], BeamParams(width=2, max_new_tokens=21))
    with pytest.raises(RequestTooLarge, match="need 13 KV blocks") as long:
        simulation.add_beams([1], BeamParams(width=2, max_new_tokens=50))
    assert (wide.value.field, long.value.field) == ("beam_width", "max_new_tokens")
    simulation.run()
    simulation.check_answers()


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_cancelling_ends_all_beams(steps: int) -> None:
    simulation = Simulation()
    leader = simulation.add_beams(PROMPT, BeamParams(width=4, max_new_tokens=9))
    for _ in range(steps):
        simulation.step()
    simulation.plan()
    assert simulation.cancel(leader)
    assert not simulation.cancel(leader)
    simulation.run()
    simulation.check_answers()


def test_beams_give_way_together_and_go_on_where_they_were() -> None:
    simulation = Simulation(num_blocks=15, max_batch_prefill_tokens=64, kv_overcommit=1.0)
    older = simulation.add(30, new=30)
    leader = simulation.add_beams([1, 2, 3, 4, 5], BeamParams(width=2, max_new_tokens=24))
    assert leader.beams is not None
    for _ in range(10_000):
        if not simulation.scheduler.has_work():
            break
        simulation.step()
        assert len({row.is_running for row in leader.beams.ranked}) <= 1
    simulation.check_answers()
    assert older.finish_reason == "length"
    assert sum(row.preemptions for row in leader.beams.members) > 0


@pytest.mark.parametrize("refused", [1, 3])
def test_lost_shards_and_refused_plans(refused: int) -> None:
    simulation = Simulation()
    simulation.add_beams(PROMPT, BeamParams(width=4, max_new_tokens=9, eos_ids=frozenset({3, 5})))
    for step in range(6):
        simulation.plan()
        if step == refused:
            simulation.shard.refuse = True
        simulation.deliver()
        if step == 4:
            simulation.lose_shards()
    simulation.run()
    simulation.check_answers()


@pytest.mark.parametrize("seed", range(8))
def test_random_searches_in_little_memory(seed: int) -> None:
    rng = random.Random(seed)
    simulation = Simulation(
        num_blocks=rng.choice([16, 24, 40]),
        block_size=rng.choice([1, 2, 4]),
        max_batch_prefill_tokens=rng.choice([4, 8, 40]),
        max_batch_size=rng.choice([0, 4, 7]),
        kv_overcommit=rng.choice([0.0, 1.0, 1.0]),
        prefix_caching=rng.random() < 0.7,
    )
    depth = rng.choice([1, 2])
    for _ in range(900):
        event = rng.random()
        if event < 0.12 and len(living(simulation)) < 8:
            prompt = [rng.randrange(1, 4) for _ in range(rng.randrange(1, 7))]
            if rng.random() < 0.6:
                arrive_beams(rng, simulation, prompt, rng.randrange(1, 9))
            else:
                with suppress(RequestTooLarge):
                    simulation.add_samples(rng.choice([1, 3]), prompt, new=rng.randrange(1, 10))
        elif event < 0.125 and living(simulation):
            simulation.cancel(rng.choice(living(simulation)))
        elif event < 0.135:
            simulation.lose_shards()
        elif event < 0.15:
            simulation.shard.refuse = True
        elif event < 0.6 and len(simulation.plans) < depth:
            simulation.plan()
        elif simulation.plans:
            simulation.deliver()
    simulation.run(depth)
    simulation.check_answers()
    assert simulation.found
