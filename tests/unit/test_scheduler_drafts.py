"""The scheduler where shards guess tokens: who may be guessed for, room for it, what comes back."""

from __future__ import annotations

from typing import Any

import pytest

from headgate.proto.messages import RowEnd, StepPlan, StepResult
from headgate.router.beam_search import BeamParams
from headgate.router.scheduler import DRAFT_SHARE, ROWS_PER_DRAFT, ProtocolError
from headgate.router.step_budget import STEPS_BEFORE_GROWTH
from tests.unit.simulation import Simulation


def drafts(plan: StepPlan | None) -> dict[int, int]:
    """By row id, of those that may be guessed for."""
    assert plan is not None
    return dict(zip(plan.rows, plan.drafts, strict=True)) if plan.drafts else {}


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_right_guesses_save_steps(depth: int) -> None:
    simulation = Simulation(draft_tokens=4, num_blocks=64, max_batch_prefill_tokens=160)
    for _ in range(3):
        simulation.add(5, new=40)
    steps = simulation.run(depth)
    simulation.check_answers()
    # Each guess is right as often as not; without them it would be 40 and more.
    assert simulation.shard.right_guesses > 40 and steps < 30


def test_guesses_come_after_the_prompts() -> None:
    simulation = Simulation(draft_tokens=4, max_batch_prefill_tokens=64, num_blocks=64)
    simulation.add(100, new=9)
    planned = [drafts(simulation.step()) for _ in range(3)]
    assert planned == [{}, {}, {0: 4}]
    simulation.add(100, new=2)
    # A step that has a part of a prompt is long already: it has none for anyone.
    assert [drafts(simulation.step()) for _ in range(2)] == [{}, {}]
    simulation.run()
    simulation.check_answers()


@pytest.mark.parametrize("sampling", [{"grammar": "x"}, {}])
def test_rows_that_need_each_token_before_the_next_have_no_guesses(
    sampling: dict[str, Any],
) -> None:
    simulation = Simulation(draft_tokens=4, max_batch_prefill_tokens=60)
    simulation.add(5, new=9, lockstep=not sampling, sampling=sampling)
    simulation.add_beams([1, 2, 3], BeamParams(width=2, max_new_tokens=9))
    simulation.add(5, new=9)
    simulation.step()
    for _ in range(3):
        assert set(drafts(simulation.step())) <= {0, 1, 2, 3}
        plan = simulation.plan()
        assert {row for row, count in drafts(plan).items() if count} <= {3}
        simulation.deliver()
    simulation.run()
    simulation.check_answers()


def test_no_row_is_guessed_for_beyond_its_length() -> None:
    simulation = Simulation(draft_tokens=4, max_batch_prefill_tokens=20)
    simulation.add(4, new=3)
    simulation.step()
    assert drafts(simulation.plan()) == {0: 1}
    assert drafts(simulation.plan()) == {}  # the plan before may bring all that is left
    assert simulation.plan() is None
    simulation.deliver()
    simulation.deliver()
    simulation.run()
    simulation.check_answers()


def test_nobody_gives_way_for_guesses() -> None:
    simulation = Simulation(draft_tokens=4, num_blocks=4, block_size=4, kv_overcommit=1.0)
    for _ in range(2):
        simulation.add(7, new=2)
    simulation.step()  # each has 2 blocks, all there are, and 1 position left
    assert drafts(simulation.plan()) == {}
    simulation.deliver()
    simulation.run()
    simulation.check_answers()
    assert simulation.scheduler.stats.preemptions == 0


def test_plans_in_flight_have_room_for_all_their_guesses() -> None:
    simulation = Simulation(draft_tokens=3, block_size=1, max_batch_prefill_tokens=160)
    request = simulation.add(4, new=20)
    simulation.step()
    for plans in (1, 2, 3):
        assert drafts(simulation.plan()) == {0: 3}
        assert len(request.block_ids) == request.num_reserved == 4 + plans * 4
    simulation.deliver()  # some guesses were right: what is in flight begins later
    assert request.num_reserved == len(request.prompt_ids) + len(request.output_ids) - 1 + 8
    simulation.run(depth=3)
    simulation.check_answers()


def test_a_step_with_guesses_is_no_large_one() -> None:
    simulation = Simulation(draft_tokens=4, max_batch_prefill_tokens=80)
    for _ in range(3):
        simulation.add(2, new=9)
    simulation.step()
    plan = simulation.plan()
    assert plan is not None and drafts(plan) == {0: 4, 1: 4, 2: 4}
    assert plan.most_drafts == 80 // DRAFT_SHARE - 3 == 5
    simulation.deliver()
    # As many rows as such a step has tokens: a guess for each, up to a fifth, or for every fourth.
    for newcomers, most in ((5, 8), (4, 16 - 12), (2, 14 // ROWS_PER_DRAFT)):
        for _ in range(newcomers):
            simulation.add(2, new=9)
        simulation.step()
        plan = simulation.plan()
        assert plan is not None and plan.most_drafts == most
        simulation.deliver()
    simulation.run()
    simulation.check_answers()


def test_steps_that_were_too_large_have_no_guesses_for_a_while() -> None:
    simulation = Simulation(draft_tokens=4, max_batch_prefill_tokens=20)
    simulation.add(4, new=60)
    simulation.step()
    simulation.shard.refuse = True
    simulation.step()
    smaller = 0
    while not drafts(simulation.step()):
        smaller += 1
    assert smaller >= STEPS_BEFORE_GROWTH
    simulation.run()
    simulation.check_answers()


@pytest.mark.parametrize(
    ("rows", "ends", "message"),
    [
        ([0] * 4, [0] * 4, "4 tokens for request 0 in step 2"),
        ([0, 0], [RowEnd.EOS, 0], "a token of request 0 after its end"),
        ([0, 7], [0, 0], "rows it did not plan"),
    ],
)
def test_results_must_match_what_was_allowed(
    rows: list[int], ends: list[int], message: str
) -> None:
    simulation = Simulation(draft_tokens=2)
    simulation.add(3, new=9)
    simulation.step()
    simulation.plan()
    count = len(rows)
    row_ends = [RowEnd(end) for end in ends]
    result = StepResult(1, 2, rows, [1] * count, [0.0] * count, row_ends)
    with pytest.raises(ProtocolError, match=message):
        simulation.scheduler.update(result)
    simulation.scheduler.check_integrity()  # nothing was taken of it
