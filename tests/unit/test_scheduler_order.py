"""Who comes first in a step: by arrival, and shorter prompts before longer ones soon after."""

from __future__ import annotations

import pytest

from tests.unit.simulation import Simulation, counts


def test_first_come_first_served() -> None:
    simulation = Simulation(max_batch_size=1)
    late = simulation.add(2, new=1, arrival=5.0)
    early = simulation.add(2, new=1, arrival=3.0)
    assert counts(simulation.step()) == {early.id: 2}
    assert counts(simulation.step()) == {late.id: 2}


@pytest.mark.parametrize(("arrival", "overtakes"), [(3.0, True), (3.7, True), (3.9, False)])
def test_a_short_prompt_overtakes_a_long_one_that_came_a_little_earlier(
    arrival: float, overtakes: bool
) -> None:
    simulation = Simulation(max_batch_size=1, num_blocks=200, max_batch_prefill_tokens=500)
    long = simulation.add(400, new=1, arrival=3.0)
    short = simulation.add(10, new=1, arrival=arrival)
    order = [short, long] if overtakes else [long, short]
    assert [list(counts(simulation.step())) for _ in order] == [[each.id] for each in order]


def test_no_prompt_is_overtaken_for_longer_than_a_second() -> None:
    simulation = Simulation(max_batch_size=1, num_blocks=2000, max_batch_prefill_tokens=5000)
    endless = simulation.add(5000, new=1, arrival=3.0)
    simulation.add(1, new=1, arrival=4.1)
    assert counts(simulation.step()) == {endless.id: 5000}


def test_a_short_prompt_goes_before_what_is_left_of_a_long_one() -> None:
    simulation = Simulation(spacing=0.001, max_batch_prefill_tokens=16, num_blocks=200)
    simulation.add(64, new=2)
    assert counts(simulation.step()) == {0: 16}
    simulation.add(10, new=2)
    simulation.add(30, new=2)
    planned = [counts(simulation.step()) for _ in range(3)]
    assert planned == [{1: 10, 2: 5, 0: 1}, {1: 1, 2: 14, 0: 1}, {2: 11, 0: 5}]
    simulation.run()
    simulation.check_answers()


def test_a_late_prompt_takes_no_memory_from_a_row_planned_before_it() -> None:
    simulation = Simulation(
        num_blocks=10, max_batch_prefill_tokens=2, max_batch_size=2, kv_overcommit=1.0
    )
    for _ in range(40):  # answers are short, it seems
        simulation.add(1, new=1, arrival=0.0)
    simulation.run()
    answer = simulation.add(4, new=20, arrival=10.2)
    simulation.step()
    simulation.step()
    prompt = simulation.add(24, new=2, arrival=10.0)
    simulation.step()
    simulation.add(3, new=1, arrival=9.9)  # its turn is first, but there is no row for it
    while counts(simulation.step()) != {answer.id: 1}:
        assert prompt.num_scheduled < len(prompt.prompt_ids)
    assert simulation.scheduler.stats.blocks_used == 10
    simulation.run(depth=2)
    simulation.check_answers()
