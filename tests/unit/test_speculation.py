"""Guessed tokens: what is guessed, and that answers are the same with guesses as without."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from headgate.kernels.cpu import library
from headgate.proto.messages import NewRow, RowEnd, RowSampling, StepPlan, StepResult
from headgate.shard.batch_limits import BatchLimits
from headgate.shard.config import ShardIdentity
from headgate.shard.distributed import single_group
from headgate.shard.drafts import guess
from headgate.shard.input_batch import InputBatch, PlanError
from headgate.shard.model_runner import ModelRunner
from headgate.shard.models.registry import load_model
from headgate.shard.step_inputs import build_inputs
from headgate.shard.step_rows import StepRows
from tests.checkpoints import make_checkpoint
from tests.unit.fake_device import FakeDevice
from tests.unit.fake_model import shard_config
from tests.unit.test_model_runner import Ranks
from tests.unit.test_steps_under_way import KINDS, by_row, one_ahead, row, runner_on

Guess = Callable[[npt.NDArray[np.int32], int, int, int], int]


def guess_in_cpp(token_ids: npt.NDArray[np.int32], known: int, most: int, room: int) -> int:
    loaded = library.load()
    if loaded is None:
        pytest.skip("the C++ kernels are not built")
    return int(loaded.hg_guess(token_ids.ctypes.data, known, most, room))


def guesses(tokens: Sequence[int], most: int, how: Guess = guess, room: int = 0) -> list[int]:
    ids = np.full(len(tokens) + most + 1, -7, np.int32)
    ids[: len(tokens)] = tokens
    count = how(ids, len(tokens), most, room)
    assert (ids[len(tokens) + count :] == -7).all()
    return ids[len(tokens) : len(tokens) + count].tolist()


@pytest.mark.parametrize("how", [guess, guess_in_cpp])
@pytest.mark.parametrize(
    ("tokens", "most", "expected"),
    [
        ([], 4, []),
        ([5], 4, []),
        ([5, 6, 7], 4, []),  # nothing was there before
        ([5, 6, 7, 5], 4, []),  # one token agrees: that says nothing yet
        ([5, 6, 7, 8, 5, 6], 4, [7]),
        ([1, 5, 6, 7, 8, 9, 5, 6, 7], 4, [8, 9]),
        ([1, 2, 3, 4, 9, 1, 2, 3], 1, [4]),
        ([5, 6, 1, 5, 6, 2, 5, 6], 4, [2]),  # of two such places the last
        ([4, 5, 6, 1, 9, 5, 6, 2, 4, 5, 6], 4, [1, 9]),  # but the longer one before the last
        ([3, 3, 3, 3], 8, [3, 3]),
        ([1, 2, 1, 2, 1, 2, 1], 8, [2, 1, 2, 1]),  # it goes on with the loop
        ([1, 2, 1, 2, 1, 2, 1], 3, [2, 1, 2]),
        ([5, 6, 7, 8, 5, 6], 0, []),
    ],
)
def test_guesses(tokens: list[int], most: int, expected: list[int], how: Guess) -> None:
    assert guesses(tokens, most, how) == expected


@pytest.mark.parametrize("how", [guess, guess_in_cpp])
@pytest.mark.parametrize(
    ("tokens", "room", "expected"),
    [
        ([5, 6, 7, 8], 99, []),  # nothing was there before
        ([5, 6, 7, 5], 5, []),
        ([5, 6, 7, 5], 6, [6]),  # one token agrees, and there is room to try what it says
        ([5, 6, 7, 5], 15, [6]),
        ([5, 6, 7, 5], 16, [6, 7]),
        ([5, 6, 7, 8, 9, 5, 6], 5, [7]),
        ([5, 6, 7, 8, 9, 5, 6], 6, [7, 8]),
        ([5, 6, 7, 8, 9, 5, 6], 16, [7, 8, 9, 5]),
        ([5, 6, 5, 6], 16, [5, 6, 5, 6]),  # it goes on with the guess
        ([1, 2, 3, 4, 5, 6, 9, 1, 2, 3, 4], 16, [5, 6, 9, 1]),  # not beyond `most`
    ],
)
def test_more_is_guessed_where_there_is_room(
    tokens: list[int], room: int, expected: list[int], how: Guess
) -> None:
    assert guesses(tokens, 4, how, room) == expected


def test_both_guess_the_same() -> None:
    draw = random.Random(3)
    for _ in range(3000):
        tokens = [draw.randrange(draw.choice([1, 2, 4])) for _ in range(draw.randrange(50))]
        most = draw.randrange(10)
        room = draw.randrange(24)
        assert guesses(tokens, most, guess, room) == guesses(tokens, most, guess_in_cpp, room)


# ------------------------------------------------------------------ a batch's rows

EOS = 99


def batch(tokens: Sequence[int], blocks: int = 8, **sampling: Any) -> InputBatch:
    """With row 1, all of whose tokens but the last are computed."""
    limits = BatchLimits(
        num_blocks=20, block_size=4, vocab_size=100, max_total_tokens=32, max_step_tokens=6
    )
    target = InputBatch(limits, [EOS])
    wishes = RowSampling(**{"max_new_tokens": 32 - len(tokens), **sampling})
    new = NewRow(1, tokens, wishes, num_computed_tokens=len(tokens) - 1, block_ids=range(blocks))
    target.apply(StepPlan(1, 1, new_rows=[new]))
    return target


LOOP = [1, 2, 3, 4, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("asked", "given", "fields"),
    [
        (3, 3, {}),
        (9, 3, {}),  # as many as agreed, but for one
        (3, 0, {"blocks": 2}),  # no room in its blocks
        (3, 1, {"max_new_tokens": 2}),
        (3, 0, {"max_new_tokens": 1}),
        (3, 0, {"grammar": "%llguidance {}"}),
    ],
)
def test_a_row_is_guessed_for_as_far_as_it_may_go(
    asked: int, given: int, fields: dict[str, Any]
) -> None:
    target = batch(LOOP, **fields)
    scheduled = target.apply(StepPlan(1, 2, rows=[1], counts=[1], drafts=[asked], most_drafts=99))
    assert scheduled.drafts.tolist() == [given]
    assert scheduled.lengths.tolist() == [1 + given]


@pytest.mark.parametrize(("most", "given"), [(99, [3, 1]), (4, [3, 1]), (2, [2, 0]), (0, [0, 0])])
def test_step_and_plan_bound_guesses_and_rows_share_what_there_is(
    most: int, given: list[int]
) -> None:
    target = batch(LOOP)
    other = NewRow(2, LOOP, RowSampling(9), block_ids=range(8, 16), num_computed_tokens=7)
    plan = StepPlan(
        1, 2, new_rows=[other], rows=[1, 2], counts=[1, 1], drafts=[9, 9], most_drafts=most
    )
    assert target.apply(plan).drafts.tolist() == given
    with pytest.raises(PlanError, match="1 numbers of guesses for 2 rows"):
        target.apply(StepPlan(1, 2, rows=[1, 2], counts=[1, 1], drafts=[9]))


def test_the_tensors_of_a_step_with_guesses() -> None:
    target = batch(LOOP)
    scheduled = target.apply(StepPlan(1, 2, rows=[1], counts=[1], drafts=[3], most_drafts=99))
    inputs = build_inputs(target, scheduled, "cpu")
    assert inputs.input_ids.tolist() == [4, 1, 2, 3]
    assert inputs.positions.tolist() == inputs.attention.slot_mapping.tolist() == [7, 8, 9, 10]
    assert (inputs.wanted_tokens.tolist(), inputs.num_samples) == ([0, 1, 2, 3], 4)
    assert inputs.attention.cu_query_lens.tolist() == [0, 4]
    assert inputs.attention.context_lens.tolist() == [11]
    sampled = target.sampled_rows(target.draws(scheduled))
    assert sampled.output_positions.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("tokens", "kept", "end", "fields"),
    [
        ([1, 2, 3, 4], 4, RowEnd.NONE, {}),  # all right, and one more
        ([1, 2, 7, 4], 3, RowEnd.NONE, {}),  # the third is not what was guessed
        ([7, 2, 3, 4], 1, RowEnd.NONE, {}),
        ([1, EOS, 3, 4], 2, RowEnd.EOS, {}),
        ([1, 2, 3, 4], 2, RowEnd.STOP_TOKEN, {"stop_token_ids": (2,)}),
        ([1, 2, 3, 4], 3, RowEnd.LENGTH, {"max_new_tokens": 3}),
    ],
)
def test_tokens_count_up_to_the_first_wrong_guess_or_the_end(
    tokens: list[int], kept: int, end: RowEnd, fields: dict[str, Any]
) -> None:
    target = batch(LOOP, **fields)
    scheduled = target.apply(StepPlan(1, 2, rows=[1], counts=[1], drafts=[3], most_drafts=99))
    drawn = np.array(tokens[: int(scheduled.lengths[0])])
    places, ends = target.settle(target.expect(scheduled), drawn)
    assert places.tolist() == list(range(kept))
    assert ends.tolist() == [RowEnd.NONE] * (kept - 1) + [end]
    slot = target.slot_of(1)
    assert (target.num_tokens[slot], target.num_computed[slot]) == (8 + kept, 7 + kept)
    assert target.token_ids[slot, 8 : 8 + kept].tolist() == tokens[:kept]
    assert bool(target.ended[slot]) == (end is not RowEnd.NONE)


# ------------------------------------------------------------------ whole answers

TEXT = list(b"the cat and the dog and the cat")
WISHES: list[dict[str, Any]] = [
    {},
    {"logprobs": True, "top_n_tokens": 2},
    {"temperature": 0.7, "seed": 5},
    {"temperature": 0.1, "seed": 6, "logprobs": True},
    {"repetition_penalty": 1.05, "frequency_penalty": 0.01},
    {"max_new_tokens": 7},
    {"watermark_gamma": 0.5, "watermark_delta": 0.5},
    {"min_new_tokens": 20, "ignore_eos": False},
    {"bad_words": ((116, 104),), "logit_bias": ((32, 1.0),)},
]


def answers(
    runner: ModelRunner,
    wishes: Sequence[dict[str, Any]],
    drafts: int,
    prompt: Sequence[int] = TEXT,
) -> tuple[dict[int, list[Any]], list[StepResult]]:
    """What each row gets, token by token, and the steps' results."""
    room = 24  # blocks of a row
    runner.allocate(len(wishes) * room)
    new = [
        NewRow(
            number,
            prompt[: min(len(prompt) - number % 7, 300 // len(wishes))],
            RowSampling(**{"max_new_tokens": 60, "ignore_eos": True, **wish}),
            block_ids=range(number * room, (number + 1) * room),
        )
        for number, wish in enumerate(wishes)
    ]
    rows = list(range(len(new)))
    plan = StepPlan(1, 1, rows, [len(each.prompt_ids) for each in new], new_rows=new)
    results: list[StepResult] = []
    while not results or results[-1].rows:
        results.append(runner.step(plan))
        assert not results[-1].refused
        counts, most = [1] * len(rows), [drafts] * len(rows) if drafts else []
        plan = StepPlan(1, plan.sequence + 1, rows, counts, most, most_drafts=sum(most))
    told: dict[int, list[Any]] = {number: [] for number in rows}
    for result in results:
        for place, number in enumerate(result.rows):
            top = tuple(result.top[place].ids) if result.top else ()
            values = result.token_ids[place], result.logprobs[place], result.ends[place], top
            told[number].append(values)
    return told, results


def make_runner(path: Path) -> ModelRunner:
    model = load_model(path, dtype="bfloat16", device="cpu", group=single_group())
    config = shard_config(max_batch_prefill_tokens=300, max_batch_size=40)
    return ModelRunner(model, single_group(), config, ShardIdentity(0, 1, epoch=1))


def check_same_answers(runner: ModelRunner, wishes: Sequence[dict[str, Any]]) -> None:
    expected, plain = answers(runner, wishes, 0)
    assert all(got[-1][2] is not RowEnd.NONE for got in expected.values())
    for drafts in (1, 5, 8):
        got, results = answers(runner, wishes, drafts)
        assert got == expected
        assert sum(result.num_drafts for result in results) > 0
        right = sum(len(result.rows) - len(set(result.rows)) for result in results)
        assert right > 0 and len(results) <= len(plain)


@pytest.fixture(scope="module")
def babbler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its layers hardly count, so that its next token follows from the last: it soon repeats
    itself."""
    return make_checkpoint(tmp_path_factory.mktemp("babbler"), initializer_range=0.02)


@pytest.mark.parametrize("recorded", [True, False])
def test_answers_are_those_without_guesses(
    recorded: bool, babbler: Path, cpu_kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = make_runner(babbler)
    if recorded:
        runner.record()
    settled, quick = StepRows.settle, [0]

    def settle(rows: StepRows, sampled_at: int) -> Any:
        quick[0] += rows.num_drafts > 0
        return settled(rows, sampled_at)

    monkeypatch.setattr(StepRows, "settle", settle)
    check_same_answers(runner, WISHES)
    check_same_answers(runner, [{}] * 3)
    check_same_answers(runner, [{}] * 40)  # with more tokens than logits come with a step
    assert bool(quick[0]) == recorded


def test_a_row_ends_among_its_guesses(babbler: Path, cpu_kernels: None) -> None:
    runner = make_runner(babbler)
    runner.record()
    tokens = [entry[0] for entry in answers(runner, [{}], 0)[0][0]]
    loop, rest = tokens[:40], tokens[40:]  # it has repeated itself by then
    for last in sorted(set(rest[2:7])):
        runner.model.config = replace(runner.model.config, eos_token_ids=(last,))
        for end in ({"stop_token_ids": (last,)}, {"ignore_eos": False}):
            wishes = [{"max_new_tokens": 20, **end}, {"max_new_tokens": 20}]
            got, results = answers(runner, wishes, 8, loop)
            assert got == answers(runner, wishes, 0, loop)[0]
            assert len(got[0]) == rest.index(last) + 1
            assert len(results) < 20


def test_ranks_guess_alike() -> None:
    ranks = Ranks()
    sampling = RowSampling(20, allowed_token_ids=(7, 8))
    new = NewRow(1, [7, 8, 9] * 4, sampling, block_ids=range(8))
    given: dict[int, list[int]] = {}
    steps: dict[int, int] = {}
    for drafts in (0, 6):
        sequence, tokens = 1, []
        plan = StepPlan(1, 1, reset=True, new_rows=[new], rows=[1], counts=[12])
        while sequence < 24:
            first, second = ranks.step(plan)
            assert not first.refused and not second.refused and not second.rows
            tokens += list(first.token_ids)
            sequence += 1
            plan = StepPlan(1, sequence, [1], [1], [drafts], most_drafts=drafts)
        given[drafts] = tokens
        held = [runner._batch.token_ids[0, :32].tolist() for runner in ranks.runners]  # type: ignore[union-attr]
        assert held[0] == held[1]
        for runner in ranks.runners:
            runner.reset()
            steps[drafts] = runner.heartbeat.beats
    assert given[6] == given[0] and len(given[0]) == 20
    assert steps[6] < 2 * steps[0]  # both runs' together


def test_on_a_device_a_step_with_guesses_waits_for_the_one_before(unwatched_triton: None) -> None:
    """So with some steps of several with guesses."""
    few = [{"allowed_token_ids": (7, 8), **KINDS[kind]} for kind in (0, 2, 3)]
    rows, new = [0, 1, 2], [row(number, **kind) for number, kind in enumerate(few)]
    plans = [StepPlan(1, 1, rows, [6] * 3, new_rows=new)]
    plans += [StepPlan(1, n, rows, [1] * 3, [4] * 3, most_drafts=n % 3 * 6) for n in range(2, 11)]
    results = one_ahead(runner_on(FakeDevice()), plans)
    without = [replace(plan, drafts=()) for plan in plans]
    expected = by_row(one_ahead(runner_on(FakeDevice()), without))
    assert by_row(results) == expected
    assert all(len(told) == 9 for told in expected.values())
    assert any(len(result.rows) > len(set(result.rows)) for result in results)
