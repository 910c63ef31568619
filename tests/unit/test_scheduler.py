"""The scheduler by cases: what is planned, when, and what comes of results, losses and refusals."""

from __future__ import annotations

import random
import time

import pytest

from headgate.proto.messages import RowEnd, RowSampling, StepResult
from headgate.router.request import Request, RequestStatus
from headgate.router.scheduler import ProtocolError, RequestTooLarge, Scheduler, SchedulerConfig
from headgate.router.step_budget import STEPS_BEFORE_GROWTH
from tests.unit.fake_shard import expected_answer
from tests.unit.simulation import EOS, VOCABULARY, Simulation, counts

# ---------------------------------------------------------------- one budget


@pytest.mark.parametrize(
    ("prompts", "budget", "steps"),
    [
        # One prompt within the budget: the whole of it, then token by token.
        ([10], 16, [{0: 10}, {0: 1}, {0: 1}, {0: 1}]),
        # One above it: in even parts.
        ([20], 8, [{0: 7}, {0: 7}, {0: 6}, {0: 1}, {0: 1}, {0: 1}]),
        # Two: the second gets what the first leaves.
        ([5, 9], 8, [{0: 5, 1: 3}, {0: 1, 1: 6}, {0: 1, 1: 1}, {0: 1, 1: 1}, {1: 1}]),
        # A third waits until there is a token for it.
        ([8, 8, 8], 8, [{0: 8}, {0: 1, 1: 7}, {0: 1, 1: 1, 2: 4}]),
        # As many rows as tokens: all advance, and nobody is admitted beyond that.
        ([1, 1, 2], 2, [*[{0: 1, 1: 1}] * 4, {2: 2}]),
    ],
)
def test_plans_of_prompts(prompts: list[int], budget: int, steps: list[dict[int, int]]) -> None:
    simulation = Simulation(max_batch_prefill_tokens=budget)
    for length in prompts:
        simulation.add(length, new=4)
    assert [counts(simulation.step()) for _ in steps] == steps
    simulation.run()
    simulation.check_answers()


def test_answers_go_on_while_a_long_prompt_is_computed() -> None:
    simulation = Simulation(max_batch_prefill_tokens=8)
    simulation.add(4, new=12)
    simulation.step()
    simulation.add(40, new=2)
    planned = [counts(simulation.step()) for _ in range(7)]
    assert planned == [*[{0: 1, 1: 7}] * 4, {0: 1, 1: 6}, {0: 1, 1: 6}, {0: 1, 1: 1}]
    simulation.run()
    simulation.check_answers()


def test_a_prompt_goes_on_while_answers_fill_the_budget() -> None:
    simulation = Simulation(max_batch_prefill_tokens=4, num_blocks=100)
    for _ in range(3):
        simulation.add(1, new=30)
    simulation.add(20, new=2)
    for _ in range(20):
        assert counts(simulation.step()) == {0: 1, 1: 1, 2: 1, 3: 1}
    simulation.run()
    simulation.check_answers()


def test_no_more_rows_than_max_batch_size() -> None:
    simulation = Simulation(max_batch_size=2)
    for _ in range(5):
        simulation.add(2, new=3)
    assert counts(simulation.step()) == {0: 2, 1: 2}
    simulation.run(depth=2)
    simulation.check_answers()


# ---------------------------------------------------------------- diffs


def test_a_row_is_sent_once_then_only_what_changes() -> None:
    simulation = Simulation()
    request = simulation.add(7, new=4)
    plan = simulation.step()
    (row,) = plan.new_rows
    assert row.id == request.id
    assert list(row.prompt_ids) == list(request.prompt_ids)
    assert len(row.block_ids) == 2
    plan = simulation.step()
    assert (list(plan.new_rows), list(plan.block_ids)) == ([], [])
    plan = simulation.step()
    assert list(plan.block_rows) == [request.id]
    assert list(plan.block_ids) == request.block_ids[2:]
    simulation.run()
    simulation.add(2)
    assert list(simulation.step().removed) == [request.id]
    assert list(simulation.step().removed) == []


def test_nothing_to_do_is_no_plan() -> None:
    simulation = Simulation()
    assert simulation.plan() is None
    assert not simulation.scheduler.has_work()


# ---------------------------------------------------------------- planning ahead


def test_planning_ahead_never_goes_beyond_the_length() -> None:
    simulation = Simulation()
    simulation.add(3, new=3)
    assert [counts(simulation.plan()) for _ in range(3)] == [{0: 3}, {0: 1}, {0: 1}]
    assert simulation.plan() is None
    outputs = [simulation.deliver() for _ in range(3)]
    assert [output.end for (output,) in outputs] == [RowEnd.NONE, RowEnd.NONE, RowEnd.LENGTH]
    simulation.check_answers()


@pytest.mark.parametrize("kind", ["eos", "stop_token"])
def test_a_row_that_ended_is_skipped_in_the_plan_made_ahead(kind: str) -> None:
    simulation = Simulation()
    prompt = next(
        [first, 2, 3]
        for first in range(1, 5000)
        if EOS not in (answer := answer_of([first, 2, 3], 2))[:1] and answer[1] == EOS
    )
    stop = {} if kind == "eos" else {"stop_token_ids": (EOS,)}
    request = simulation.add(prompt, new=30, eos=kind == "eos", sampling=stop)
    other = simulation.add(3, new=6)
    for _ in range(3):
        simulation.plan()
    simulation.deliver()
    assert [output.end for output in simulation.deliver()] == [RowEnd[kind.upper()], RowEnd.NONE]
    assert request.finish_reason == kind
    assert [output.request for output in simulation.deliver()] == [other]
    simulation.run(depth=2)
    simulation.check_answers()


def answer_of(prompt: list[int], length: int) -> list[int]:
    """Of the first request of a simulation."""
    sampling = RowSampling(max_new_tokens=length, ignore_eos=True)
    return expected_answer(prompt, sampling, vocabulary=VOCABULARY, eos_id=EOS)[0]


def test_the_surplus_of_a_request_stopped_by_the_router_is_dropped() -> None:
    simulation = Simulation()
    request = simulation.add(3, new=20)
    other = simulation.add(3, new=6)
    simulation.plan()
    simulation.plan()
    simulation.deliver()
    assert simulation.scheduler.finish(request.id, "stop_sequence")
    assert not simulation.scheduler.finish(request.id, "stop_sequence")
    assert [output.request for output in simulation.deliver()] == [other]
    assert request.finish_reason == "stop_sequence"
    assert len(request.output_ids) == 1
    plan = simulation.step()
    assert list(plan.removed) == [request.id]
    simulation.run()
    simulation.check_answers()


def test_lockstep_rows_wait_for_their_result() -> None:
    simulation = Simulation(max_batch_prefill_tokens=8)
    simulation.add(12, new=3, lockstep=True)
    assert counts(simulation.plan()) == {0: 6}
    assert counts(simulation.plan()) == {0: 6}, "a chunk of the prompt needs no result"
    assert simulation.plan() is None
    simulation.deliver()
    assert simulation.plan() is None
    simulation.deliver()
    assert counts(simulation.plan()) == {0: 1}
    assert simulation.plan() is None
    simulation.run(depth=2)
    simulation.check_answers()


# ---------------------------------------------------------------- prefix cache


def test_a_prompt_seen_before_costs_half_a_block() -> None:
    simulation = Simulation()
    prompt = list(range(1, 13))
    simulation.add(prompt, new=2)
    simulation.run()
    again = simulation.add(prompt, new=2)
    assert counts(simulation.step()) == {1: 2}
    simulation.run()
    assert again.num_cached_tokens == 10
    assert simulation.scheduler.stats.prefix_hits == 10
    assert simulation.scheduler.stats.prefix_queries == 24
    simulation.check_answers()


def test_the_next_turn_of_a_conversation_finds_the_answer_too() -> None:
    simulation = Simulation()
    first = simulation.add(6, new=7)
    simulation.run()
    turn = simulation.add([*first.prompt_ids, *first.output_ids, 5], new=2)
    simulation.run()
    assert turn.num_cached_tokens == 12
    simulation.check_answers()


def test_who_skips_the_cache_computes_all() -> None:
    simulation = Simulation()
    prompt = list(range(1, 13))
    simulation.add(prompt, new=2)
    simulation.run()
    simulation.add(prompt, new=2, skip_prefix_cache=True, sampling={"prompt_logprobs": True})
    assert counts(simulation.step()) == {1: 12}
    simulation.run()
    assert simulation.scheduler.stats.prefix_queries == 12
    simulation.check_answers()


def test_requests_that_share_a_prefix_share_its_memory() -> None:
    simulation = Simulation(num_blocks=12, max_batch_prefill_tokens=40)
    prompt = list(range(1, 26))  # 6 full blocks
    simulation.add(prompt, new=7)
    simulation.step()
    simulation.add(prompt, new=7)
    simulation.step()
    assert simulation.scheduler.stats.num_running == 2
    assert simulation.scheduler.stats.blocks_used == 8
    simulation.run()
    simulation.check_answers()


# ---------------------------------------------------------------- memory


def test_a_request_that_can_never_fit_is_refused() -> None:
    simulation = Simulation(num_blocks=4, max_total_tokens=100)
    simulation.add(10, new=7)  # 16 positions: the last token needs none
    with pytest.raises(RequestTooLarge, match=r"10 prompt .* 8 new .* need 5 KV .* there are 4"):
        simulation.add(10, new=8)
    with pytest.raises(RequestTooLarge, match=r"max_total_tokens \(100\)"):
        simulation.add(10, new=91)
    simulation.run()
    simulation.check_answers()


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(0, [1], RowSampling(max_new_tokens=1)), "here already"),
        (Request(1, [], RowSampling(max_new_tokens=1)), "empty prompt"),
        (Request(1, [1], RowSampling(max_new_tokens=1), output_ids=[3]), "all its tokens"),
        (Request(1, [1], RowSampling(max_new_tokens=0)), "all its tokens"),
    ],
)
def test_what_is_no_request(request_: Request, message: str) -> None:
    simulation = Simulation()
    simulation.add(3)
    with pytest.raises(ValueError, match=message):
        simulation.scheduler.add(request_)


def test_the_latest_gives_way_and_comes_back_with_its_tokens() -> None:
    simulation = Simulation(num_blocks=8, kv_overcommit=1.0)
    oldest = simulation.add(8, new=20)
    latest = simulation.add(8, new=20)
    while latest.status is not RequestStatus.PREEMPTED:
        simulation.step()
    generated = len(latest.output_ids)
    assert generated > 0
    assert oldest.preemptions == 0
    waiting = simulation.add(2, new=2)
    while latest.status is not RequestStatus.RUNNING:
        plan = simulation.step()
    assert waiting.status is RequestStatus.WAITING or waiting.id in plan.rows
    (row,) = [row for row in plan.new_rows if row.id == latest.id]
    assert len(row.output_ids) == generated
    simulation.run()
    assert simulation.scheduler.stats.preemptions == latest.preemptions > 0
    simulation.check_answers()


def test_a_preempted_request_first_takes_the_tokens_in_flight() -> None:
    simulation = Simulation(num_blocks=8, kv_overcommit=1.0)
    oldest = simulation.add(8, new=20)
    latest = simulation.add(8, new=20)
    while latest.status is not RequestStatus.PREEMPTED:
        while len(simulation.plans) < 3:
            simulation.plan()
        if latest.status is not RequestStatus.PREEMPTED:
            simulation.deliver()
    known, in_flight = len(latest.output_ids), latest.in_flight
    assert in_flight > 0
    simulation.cancel(oldest)
    while latest.in_flight:
        assert simulation.plan() is None, "there is room for it, but its tokens are not all here"
        simulation.deliver()
    assert len(latest.output_ids) == known + in_flight
    simulation.run(depth=2)
    simulation.check_answers()


def test_without_overcommit_nobody_is_preempted() -> None:
    rng = random.Random(1)
    simulation = Simulation(num_blocks=20, kv_overcommit=0.0)
    for _ in range(40):
        simulation.add(rng.randrange(1, 20), new=rng.randrange(1, 30), eos=True)
    simulation.run(depth=2)
    assert simulation.scheduler.stats.preemptions == 0
    simulation.check_answers()


def test_a_request_as_large_as_the_memory_is_served_among_others() -> None:
    simulation = Simulation(num_blocks=8, kv_overcommit=1.0)
    for new in (6, 23, 6):
        simulation.add(10, new=new)
    simulation.run(depth=2)
    simulation.check_answers()


# ---------------------------------------------------------------- cancelling


@pytest.mark.parametrize("steps", range(4))
@pytest.mark.parametrize("ahead", range(3))
def test_cancelled_at_any_time(steps: int, ahead: int) -> None:
    simulation = Simulation(max_batch_prefill_tokens=8)
    simulation.add(3, new=9)
    request = simulation.add(12, new=9)
    for _ in range(steps):
        simulation.step()
    for _ in range(ahead):
        simulation.plan()
    assert simulation.cancel(request)
    assert not simulation.cancel(request)
    assert request.block_ids == []
    simulation.run(depth=2)
    assert request.finish_reason == "cancelled"
    simulation.check_answers()


def test_cancelled_while_preempted_with_a_token_in_flight() -> None:
    simulation = Simulation(num_blocks=8, kv_overcommit=1.0)
    simulation.add(8, new=20)
    latest = simulation.add(8, new=20)
    while latest.status is not RequestStatus.PREEMPTED or not latest.in_flight:
        while len(simulation.plans) < 2:
            simulation.plan()
        if latest.status is not RequestStatus.PREEMPTED:
            simulation.deliver()
    simulation.cancel(latest)
    simulation.run(depth=2)
    simulation.check_answers()


# ---------------------------------------------------------------- losses


def test_lost_shards_are_replayed_with_the_tokens_so_far() -> None:
    simulation = Simulation()
    first, second = simulation.add(6, new=9), simulation.add(6, new=9)
    waiting = simulation.add(20, new=3)
    for _ in range(3):
        simulation.step()
    simulation.plan()
    simulation.lose_shards()
    assert [first.recoveries, second.recoveries] == [1, 1]
    plan = simulation.step()
    assert [len(row.output_ids) for row in plan.new_rows[:2]] == [3, 3]
    assert [row.num_computed_tokens for row in plan.new_rows] == [0] * len(plan.new_rows)
    simulation.run(depth=2)
    assert waiting.recoveries <= 1
    simulation.check_answers()


def test_results_of_lost_shards_are_dropped() -> None:
    simulation = Simulation()
    simulation.add(3, new=5)
    plan = simulation.plan()
    assert plan is not None
    late = simulation.shard.execute(plan)
    simulation.lose_shards()
    assert simulation.scheduler.update(late) == []
    simulation.plan()
    assert simulation.scheduler.update(late) == [], "the same number, of another epoch"
    simulation.run()
    simulation.check_answers()


def test_new_shards_may_have_less_memory() -> None:
    simulation = Simulation(num_blocks=32)
    large, small = simulation.add(60, new=9), simulation.add(6, new=9)
    simulation.step()
    assert simulation.scheduler.reset(num_blocks=10) == [large]
    assert large.finish_reason == "too_large"
    assert small.status is RequestStatus.PREEMPTED or small.status is RequestStatus.WAITING
    assert simulation.scheduler.stats.blocks_total == 10


def test_a_request_another_router_had_begun_goes_on() -> None:
    simulation = Simulation()
    whole = simulation.add(6, new=9)
    simulation.run()
    begun = Request(1, whole.prompt_ids, whole.sampling, output_ids=whole.output_ids[:4])
    simulation.scheduler.add(begun)
    simulation.requests.append(begun)
    simulation.answers[1] = begun.output_ids[:]
    simulation.run(depth=2)
    assert begun.output_ids == whole.output_ids
    assert begun.num_cached_tokens == 6, "of the prompt; the cache held two tokens more"
    simulation.check_answers()


# ---------------------------------------------------------------- refusals


def test_after_a_refusal_all_rows_are_sent_again() -> None:
    simulation = Simulation()
    requests = [simulation.add(6, new=12) for _ in range(2)]
    simulation.step()
    simulation.step()
    simulation.shard.refuse = True
    simulation.plan()
    simulation.plan()
    assert simulation.deliver() == []
    known = [len(request.output_ids) for request in requests]
    plan = simulation.scheduler.schedule(1, 5)
    assert plan is not None and plan.reset
    assert [row.id for row in plan.new_rows] == [0]  # two tokens were refused: one at a time
    assert plan.new_rows[0].num_computed_tokens == 6 + known[0] - 1
    simulation.scheduler.check_integrity()
    simulation.sequence = 5
    simulation.plans.append(plan)
    assert simulation.deliver() == [], "the second of the refused plans"
    simulation.run(depth=2)
    assert simulation.scheduler.stats.refusals == 1
    simulation.check_answers()


def test_refused_tells_the_same_as_a_refused_result() -> None:
    simulation = Simulation()
    simulation.add(6, new=4)
    plan = simulation.plan()
    assert plan is not None
    simulation.scheduler.refused(plan.sequence)
    simulation.scheduler.refused(plan.sequence)
    simulation.scheduler.check_integrity()
    assert simulation.scheduler.stats.refusals == 1
    simulation.shard.refuse = True
    assert simulation.deliver() == []
    assert simulation.step().reset
    simulation.run()
    simulation.check_answers()


def test_the_budget_is_halved_and_grows_back() -> None:
    simulation = Simulation(max_batch_prefill_tokens=16, num_blocks=64)
    simulation.add(96, new=60)
    simulation.shard.refuse_above = 5
    budgets = []
    for _ in range(3):
        budgets.append(simulation.scheduler.stats.step_budget)
        simulation.step()
    assert budgets == [16, 8, 4]
    simulation.shard.refuse_above = 0
    for _ in range(STEPS_BEFORE_GROWTH):
        simulation.step()
    assert simulation.scheduler.stats.step_budget == 8
    assert simulation.scheduler.stats.refusals_in_a_row == 0
    simulation.run()
    assert simulation.scheduler.stats.step_budget == 16
    simulation.check_answers()


def test_rows_take_turns_when_a_step_is_smaller_than_their_number() -> None:
    simulation = Simulation(num_blocks=64)
    for _ in range(8):
        simulation.add(2, new=30)
    simulation.step()
    simulation.shard.refuse = True
    simulation.step()
    assert simulation.scheduler.stats.step_budget == 4
    planned = [counts(simulation.step()) for _ in range(4)]
    assert all(len(plan) == 4 and 0 in plan for plan in planned)
    assert {row for plan in planned for row in plan} == set(range(8))
    simulation.run(depth=2)
    simulation.check_answers()


# ---------------------------------------------------------------- results that do not match


@pytest.mark.parametrize(
    ("sequence", "rows", "message"),
    [
        (1, [], "no token for request 0 in step 1"),
        (1, [7], "no token for request 0 in step 1"),
        (1, [0, 7], "rows it did not plan"),
        (2, [0], "step 2 was answered before"),
    ],
)
def test_results_must_match_their_plans(sequence: int, rows: list[int], message: str) -> None:
    simulation = Simulation()
    simulation.add(3, new=9)
    simulation.plan()
    simulation.plan()
    count = len(rows)
    result = StepResult(1, sequence, rows, [1] * count, [0.0] * count, [RowEnd.NONE] * count)
    with pytest.raises(ProtocolError, match=message):
        simulation.scheduler.update(result)
    simulation.run(depth=2)
    simulation.check_answers()


def test_outputs_carry_what_the_shard_said() -> None:
    simulation = Simulation()
    request = simulation.add(3, new=1)
    simulation.plan()
    (output,) = simulation.deliver()
    assert output.request is request
    assert output.token_id == request.output_ids[0]
    assert output.logprob == -output.token_id / 4
    assert output.top is not None and list(output.top.ids) == [output.token_id]
    assert output.end is RowEnd.LENGTH


# ---------------------------------------------------------------- speed


def test_a_step_of_256_rows_is_planned_in_milliseconds() -> None:
    """About 0.4 ms for schedule and update on the reference machine; the bound leaves room."""
    scheduler = Scheduler(SchedulerConfig(20_000, 16, 4096, max_batch_size=256))
    for number in range(256):
        sampling = RowSampling(max_new_tokens=400)
        scheduler.add(Request(number, [number] * 8, sampling, arrival=number))
    times = []
    for sequence in range(1, 60):
        start = time.perf_counter()
        plan = scheduler.schedule(1, sequence)
        assert plan is not None
        rows, none = plan.rows, [RowEnd.NONE] * 256
        result = StepResult(
            1, sequence, rows, [5] * len(rows), [0.0] * len(rows), none[: len(rows)]
        )
        scheduler.update(result)
        times.append(time.perf_counter() - start)
    assert scheduler.stats.num_running == 256
    assert min(times) < 0.005
