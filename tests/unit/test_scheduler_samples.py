"""Several answers to one prompt: its KV is computed once and shared, copy on write."""

from __future__ import annotations

import pytest

from headgate.router.request import RequestStatus
from tests.unit.simulation import Simulation

PROMPT = list(range(1, 11))  # two blocks of 4, and a half


@pytest.mark.parametrize("caching", [True, False], ids=["cache", "no_cache"])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("length", [1, 8, 9, 10])
def test_the_prompt_is_computed_once(length: int, depth: int, caching: bool) -> None:
    simulation = Simulation(prefix_caching=caching)
    samples = simulation.add_samples(4, PROMPT[:length], new=6)
    simulation.run(depth)
    simulation.check_answers()
    assert len({tuple(sample.output_ids) for sample in samples}) == 4
    # 5 tokens of each answer are computed, and each child computes the prompt's last one again.
    assert simulation.shard.tokens_computed == length + 4 * 5 + 3


def test_children_fork_while_the_prompts_result_is_out() -> None:
    simulation = Simulation()
    leader, *children = simulation.add_samples(3, PROMPT, new=4)
    first, second = simulation.plan(), simulation.plan()
    assert first is not None and second is not None
    assert [fork.child for fork in second.forks] == [child.id for child in children]
    assert second.rows == [sample.id for sample in (leader, *children)]
    assert second.counts == [1, 1, 1]
    source = leader.block_ids[2]
    assert second.copies == [(source, child.block_ids[2]) for child in children]
    assert all(child.block_ids[:2] == leader.block_ids[:2] for child in children)
    simulation.run()
    simulation.check_answers()


def test_children_wait_for_a_prompt_in_chunks_and_nobody_passes_them() -> None:
    simulation = Simulation(max_batch_prefill_tokens=4)
    leader, child = simulation.add_samples(2, PROMPT, new=4)
    late = simulation.add(2, new=2)
    for _ in range(3):
        simulation.plan()
        assert child.status is late.status is RequestStatus.WAITING
    plan = simulation.plan()
    assert plan is not None and plan.rows == [leader.id, child.id, late.id]
    simulation.run()
    simulation.check_answers()


def test_each_answer_is_one_of_the_rows_that_run_at_once() -> None:
    simulation = Simulation(max_batch_size=3)
    leader, *children = simulation.add_samples(5, PROMPT, new=4)
    late = simulation.add(2, new=2)
    simulation.step()
    plan = simulation.step()
    assert plan.rows == [leader.id, children[0].id, children[1].id]
    simulation.run(depth=2)
    simulation.check_answers()
    assert late.is_finished


def test_a_leader_that_ends_with_its_first_token_has_given_its_prompt_on() -> None:
    simulation = Simulation()
    leader, child = simulation.add_samples(2, PROMPT, new=1)
    simulation.plan()
    simulation.plan()
    simulation.deliver()
    assert leader.is_finished and child.is_running
    simulation.run()
    simulation.check_answers()


@pytest.mark.parametrize("whose", [0, 1])
def test_samples_are_cancelled_one_by_one(whose: int) -> None:
    simulation = Simulation()
    samples = simulation.add_samples(3, PROMPT, new=6)
    simulation.step()
    simulation.step()
    assert simulation.cancel(samples[whose])
    simulation.run()
    simulation.check_answers()


def test_children_of_a_cancelled_leader_find_its_prompt_in_the_cache() -> None:
    simulation = Simulation()
    leader, child = simulation.add_samples(2, PROMPT, new=4)
    simulation.step()
    simulation.cancel(leader)
    plan = simulation.step()
    assert [row.num_computed_tokens for row in plan.new_rows] == [8]
    simulation.run()
    simulation.check_answers()
    assert child.num_cached_tokens == 8


def test_a_refused_fork_is_made_again() -> None:
    simulation = Simulation()
    leader, child, *_ = simulation.add_samples(4, PROMPT, new=4)
    simulation.step()
    assert simulation.plan() is not None
    simulation.shard.refuse = True
    simulation.deliver()
    assert leader.is_running and child.status is RequestStatus.PREEMPTED
    plan = simulation.plan()
    assert plan is not None and plan.reset
    assert [row.id for row in plan.new_rows] == [leader.id]
    assert [fork.child for fork in plan.forks] == [child.id]
    simulation.run(depth=2)
    simulation.check_answers()


def test_preempted_samples_are_recomputed_from_the_cache() -> None:
    simulation = Simulation(num_blocks=9, kv_overcommit=1.0)
    simulation.add_samples(4, PROMPT, new=16)
    simulation.run(depth=2)
    simulation.check_answers()
    assert simulation.scheduler.stats.preemptions > 0


def test_prompt_logprobs_are_the_leaders() -> None:
    simulation = Simulation()
    leader, child = simulation.add_samples(
        2, PROMPT, new=4, skip_prefix_cache=True, sampling={"prompt_logprobs": True}
    )
    simulation.run()
    simulation.check_answers()
    assert len(simulation.prompt_logprobs[leader.id]) == len(PROMPT) - 1
    assert child.id not in simulation.prompt_logprobs
