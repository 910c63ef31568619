"""Prefixes that are being computed are shared like those that have been."""

from __future__ import annotations

from typing import Any

import pytest

from headgate.proto.messages import RowEnd
from headgate.router.request import Request, RequestStatus
from tests.unit.simulation import VOCABULARY, Simulation, counts

SHARED = [*range(1, 30), 7, 7, 7]  # eight blocks of 4


def together(simulation: Simulation, count: int, **fields: Any) -> list[Request]:
    """Requests that differ after a long prefix."""
    return [
        simulation.add([*SHARED, number + 1, number + 2], new=3, **fields)
        for number in range(count)
    ]


@pytest.mark.parametrize("budget", [64, 8])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_requests_that_come_together_compute_their_prefix_once(depth: int, budget: int) -> None:
    simulation = Simulation(max_batch_prefill_tokens=budget)
    requests = together(simulation, 6)
    simulation.run(depth)
    # Of each answer's three tokens two are computed.
    assert simulation.shard.tokens_computed == len(SHARED) + 6 * (2 + 2)
    assert [request.num_cached_tokens for request in requests] == [0, *[len(SHARED)] * 5]
    assert simulation.scheduler.stats.prefix_hits == 5 * len(SHARED)
    simulation.check_answers()


def test_one_plan_computes_a_prefix_and_what_follows_it_elsewhere() -> None:
    simulation = Simulation(max_batch_prefill_tokens=64)
    first, second = together(simulation, 2)
    plan = simulation.step()
    assert counts(plan) == {0: 34, 1: 2}
    assert [row.num_computed_tokens for row in plan.new_rows] == [0, 32]
    assert second.block_ids[:8] == first.block_ids[:8]
    assert second.block_ids[8] != first.block_ids[8]
    simulation.run()
    simulation.check_answers()


def test_the_last_token_is_computed_by_each() -> None:
    simulation = Simulation(max_batch_prefill_tokens=64)
    simulation.add(SHARED, new=2)
    simulation.add(SHARED, new=2)
    assert counts(simulation.step()) == {0: 32, 1: 4}
    simulation.run()
    simulation.check_answers()


@pytest.mark.parametrize("whole", [False, True])
def test_who_does_not_share(whole: bool) -> None:
    simulation = Simulation(max_batch_prefill_tokens=80, prefix_caching=whole)
    together(simulation, 2, skip_prefix_cache=whole, sampling={"prompt_logprobs": whole})
    assert counts(simulation.step()) == {0: 34, 1: 34}
    simulation.run()
    simulation.check_answers()


# ---------------------------------------------------------------- in the middle of a prompt


def overtaken(simulation: Simulation, **fields: Any) -> tuple[Request, Request]:
    """A long prompt, and a shorter one that has gone before what is left of it."""
    long = simulation.add([*SHARED, *range(2, 14)], new=3, arrival=0.0, **fields)
    assert counts(simulation.plan()) == {long.id: 8}
    short = simulation.add([*SHARED, 9, 9], new=3, arrival=0.001)
    assert counts(simulation.plan()) == {short.id: 7, long.id: 1}
    return long, short


def another_answer(simulation: Simulation, leader: Request) -> Request:
    """To the leader's prompt, which the leader computes."""
    return simulation.add(
        leader.prompt_ids,
        new=leader.sampling.max_new_tokens,
        leader=leader,
        arrival=leader.arrival,
        sampling={"seed": leader.sampling.seed, "sample_index": 1},
    )


@pytest.mark.parametrize("late", [False, True])
def test_an_overtaken_prompt_goes_on_where_the_other_has_got(late: bool) -> None:
    simulation = Simulation(max_batch_prefill_tokens=8)
    long, short = overtaken(simulation)
    if not late:
        simulation.deliver()
        simulation.deliver()
    plan = simulation.plan()
    assert plan is not None
    assert counts(plan) == {short.id: 7, long.id: 1}
    # The other's 22nd token is computed in this plan: five blocks are full.
    assert list(plan.removed) == [row.id for row in plan.new_rows] == [long.id]
    assert plan.new_rows[0].num_computed_tokens == 20
    assert long.block_ids[:5] == short.block_ids[:5]
    simulation.run(depth=2)
    # 34 and 12 tokens of prompts, two of each answer; and one a step, as any row is sure of, that
    # the next takeover made useless.
    assert simulation.shard.tokens_computed == (34 + 2) + (12 + 2) + 3
    assert long.num_cached_tokens == 0  # when it was admitted
    assert simulation.scheduler.stats.prefix_hits == 8 + (20 - 9) + (28 - 21) + (32 - 29)
    simulation.check_answers()


def test_a_prompt_whose_logprobs_are_asked_for_is_computed_by_itself() -> None:
    simulation = Simulation(max_batch_prefill_tokens=8)
    overtaken(simulation, skip_prefix_cache=True, sampling={"prompt_logprobs": True})
    simulation.run(depth=2)
    assert simulation.shard.tokens_computed == (26 + 2) + (44 + 2)
    simulation.check_answers()


def test_a_leader_that_took_over_is_forked() -> None:
    simulation = Simulation(max_batch_prefill_tokens=8)
    leader, _ = overtaken(simulation)
    child = another_answer(simulation, leader)
    simulation.run(depth=2)
    assert child.num_cached_tokens == 0
    assert simulation.shard.tokens_computed == (34 + 2) + (12 + 2) + 3 + (1 + 2)
    simulation.check_answers()


# ---------------------------------------------------------------- what comes between


def stop(simulation: Simulation, request: Request) -> None:
    simulation.cancel(request)


def preempt(simulation: Simulation, request: Request) -> None:
    simulation.scheduler._rows.give_way([request])


@pytest.mark.parametrize("what", [stop, preempt])
def test_blocks_of_a_row_that_left_are_shared_while_their_plan_is_out(what: Any) -> None:
    simulation = Simulation(max_batch_prefill_tokens=64)
    first = simulation.add([*SHARED, 1, 2], new=3, arrival=5.0)
    simulation.plan()
    what(simulation, first)
    simulation.add([*SHARED, 3, 4], new=3, arrival=1.0)
    assert counts(simulation.plan()) == {1: 2}
    simulation.run()
    simulation.check_answers()


@pytest.mark.parametrize("cancelled", [False, True])
@pytest.mark.parametrize("ahead", [0, 1])
def test_what_refused_plans_were_to_fill_is_not_found(ahead: int, cancelled: bool) -> None:
    simulation = Simulation(max_batch_prefill_tokens=64)
    (first,) = together(simulation, 1)
    if ahead:
        simulation.plan()
    _, last = together(simulation, 2)
    simulation.shard.refuse = True
    simulation.plan()
    assert last.num_scheduled > len(SHARED)
    simulation.deliver()
    assert first.is_running and last.status is RequestStatus.PREEMPTED
    assert simulation.scheduler.stats.blocks_cached == 0
    if cancelled:
        simulation.cancel(first)
    simulation.run(depth=2)
    assert simulation.shard.tokens_computed == len(SHARED) + (3 - cancelled) * (2 + 2)
    simulation.check_answers()


@pytest.mark.parametrize("delivered", [1, 2])
def test_a_prompt_that_took_over_from_a_refused_plan_waits_again(delivered: int) -> None:
    simulation = Simulation(max_batch_prefill_tokens=8)
    long, short = overtaken(simulation)
    simulation.plan()
    for _ in range(delivered):
        simulation.deliver()
    assert long.num_confirmed == 20, "what was in flight says nothing new"
    simulation.shard.refuse = True
    simulation.deliver()
    assert long.status is RequestStatus.PREEMPTED
    simulation.cancel(short)
    assert simulation.step().new_rows[0].num_computed_tokens == 4 + 4 * delivered
    simulation.run(depth=2)
    simulation.check_answers()


def test_the_end_of_an_answer_that_is_planned_but_never_computed_is_not_found() -> None:
    simulation = Simulation(block_size=1)
    simulation.add([1, 2], new=9, sampling={"stop_token_ids": range(VOCABULARY)})
    for _ in range(3):
        simulation.plan()
    (output,) = simulation.deliver()
    assert output.end is RowEnd.STOP_TOKEN
    simulation.add([1, 2, output.token_id, 3], new=1)
    simulation.run()
    assert simulation.requests[1].num_cached_tokens == 2
    simulation.check_answers()


def test_no_copy_is_made_of_a_block_that_the_same_plan_fills() -> None:
    """A leader comes back with tokens that another request's prompt has, and a child forks."""
    simulation = Simulation(max_batch_prefill_tokens=64)
    leader = simulation.add(SHARED[:10], new=8, arrival=1.0)
    for _ in range(4):
        simulation.step()
    simulation.lose_shards()
    simulation.add([*leader.prompt_ids, *leader.output_ids], new=2, arrival=0.0)
    child = another_answer(simulation, leader)
    plan = simulation.step()
    assert [row.num_computed_tokens for row in plan.new_rows] == [0, 12]
    assert simulation.step().forks[0].child == child.id
    simulation.run()
    simulation.check_answers()


# ---------------------------------------------------------------- beginnings of blocks


def test_a_prefix_that_ends_in_a_block_is_shared_up_to_there() -> None:
    simulation = Simulation(max_batch_prefill_tokens=64)
    first = simulation.add([*SHARED[:10], 40, 41], new=3)
    simulation.run()
    second = simulation.add([*SHARED[:10], 42, 43, 44], new=3)
    plan = simulation.step()
    assert counts(plan) == {second.id: 3}
    ((source, target),) = plan.copies
    assert target == second.block_ids[2] != source
    assert plan.new_rows[0].num_computed_tokens == second.num_cached_tokens == 10
    simulation.run()
    assert simulation.scheduler.stats.prefix_hits == 10
    assert first.num_cached_tokens == 0
    simulation.check_answers()


def test_what_is_copied_was_computed_by_an_earlier_plan() -> None:
    simulation = Simulation(max_batch_prefill_tokens=64)
    simulation.add([*SHARED[:10], 40, 41, 42], new=3)
    simulation.add([*SHARED[:10], 43, 44, 45], new=3)
    plan = simulation.plan()
    assert plan is not None
    assert counts(plan) == {0: 13, 1: 5} and not plan.copies
    simulation.add([*SHARED[:10], 46, 47, 48], new=3)
    plan = simulation.plan()
    assert plan is not None
    assert counts(plan)[2] == 3 and len(plan.copies) == 1
    simulation.run()
    simulation.check_answers()


def test_what_refused_plans_were_to_copy_is_computed() -> None:
    simulation = Simulation(max_batch_prefill_tokens=64)
    simulation.add([*SHARED[:10], 40, 41], new=3)
    simulation.run()
    second = simulation.add([*SHARED[:10], 42, 43, 44], new=3)
    simulation.shard.refuse = True
    plan = simulation.plan()
    assert plan is not None and plan.copies
    simulation.deliver()
    assert second.status is RequestStatus.PREEMPTED and not second.copies
    assert len(simulation.step().copies) == 1
    simulation.run()
    simulation.check_answers()


def test_the_block_that_is_copied_may_be_taken_by_the_same_plan() -> None:
    """There are so few blocks that the new row needs the one that it begins with a copy of."""
    simulation = Simulation(max_batch_prefill_tokens=64, num_blocks=4)
    simulation.add([*SHARED[:6], 40, 41], new=2)
    simulation.run()
    second = simulation.add([*SHARED[:6], *range(30, 40)], new=1)
    plan = simulation.plan()
    assert plan is not None and counts(plan) == {second.id: 10}
    ((source, _),) = plan.copies
    assert source in second.block_ids[1:]
    simulation.run()
    simulation.check_answers()
