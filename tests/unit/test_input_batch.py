"""InputBatch: a plan's changes, what does not fit, row ends; and the tensors made of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from headgate.proto.messages import Fork, NewRow, RowEnd, RowSampling, StepPlan
from headgate.shard.batch_limits import BatchLimits
from headgate.shard.input_batch import InputBatch, PlanError
from headgate.shard.sampling.sampler import sample
from headgate.shard.scheduled_rows import Draws
from headgate.shard.step_inputs import build_inputs

LIMITS = BatchLimits(
    num_blocks=20,
    block_size=4,
    vocab_size=100,
    max_total_tokens=32,
    max_step_tokens=24,
    expected_rows=2,
)
EOS = 99


def batch() -> InputBatch:
    return InputBatch(LIMITS, [EOS])


def new_row(row_id: int, tokens: int = 5, blocks: list[int] | None = None, **fields: Any) -> NewRow:
    sampling = {name: fields.pop(name) for name in list(fields) if hasattr(RowSampling, name)}
    row = NewRow(
        id=row_id,
        prompt_ids=list(range(tokens)),
        sampling=RowSampling(**{"max_new_tokens": 4, **sampling}),
        block_ids=[2 * row_id, 2 * row_id + 1] if blocks is None else blocks,
    )
    return replace(row, **fields)


def plan(**fields: Any) -> StepPlan:
    return StepPlan(epoch=1, sequence=1, **fields)


def run(target: InputBatch, tokens: list[int], **fields: Any) -> list[int]:
    """Applies a plan and takes its tokens; returns the ends."""
    scheduled = target.apply(plan(**fields))
    return target.advance(scheduled, np.array(tokens, np.int64)).tolist()


# ------------------------------------------------------------------ scheduling


def test_a_row_samples_when_all_its_tokens_are_computed() -> None:
    target = batch()
    first = target.apply(plan(new_rows=[new_row(1), new_row(2, 3)], rows=[1, 2], counts=[4, 3]))
    assert first.samples.tolist() == [False, True]
    target.advance(first, np.array([42]))
    second = target.apply(plan(rows=[2, 1], counts=[1, 1]))
    assert second.samples.tolist() == [True, True]
    inputs = build_inputs(target, second, "cpu")
    assert inputs.input_ids.tolist() == [42, 4]  # 42 was never sent
    assert inputs.positions.tolist() == [3, 4]


def test_the_tensors_of_a_mixed_step() -> None:
    target = batch()
    target.advance(
        target.apply(plan(new_rows=[new_row(1, 6, [7, 3])], rows=[1], counts=[6])), np.array([50])
    )
    scheduled = target.apply(
        plan(
            new_rows=[new_row(2, 9, [5, 6], num_computed_tokens=4)],
            rows=[2, 1],
            counts=[3, 1],
        )
    )
    inputs = build_inputs(target, scheduled, "cpu")
    attention = inputs.attention
    assert inputs.input_ids.tolist() == [4, 5, 6, 50]
    assert inputs.positions.tolist() == [4, 5, 6, 6]
    assert attention.cu_query_lens.tolist() == [0, 3, 4]
    assert attention.context_lens.tolist() == [7, 7]
    assert attention.block_tables.tolist() == [[5, 6], [7, 3]]
    assert attention.slot_mapping.tolist() == [24, 25, 26, 14]
    assert (attention.max_query_len, attention.max_context_len) == (3, 7)
    assert (inputs.wanted_tokens.tolist(), inputs.num_samples) == ([3], 1)


def test_changes_apply_in_the_documented_order() -> None:
    target = batch()
    target.apply(plan(new_rows=[new_row(1, blocks=[0])]))
    # Row 1 is removed before it comes again, forked after that, and gets its blocks last.
    scheduled = target.apply(
        plan(
            removed=[1, 77],
            new_rows=[new_row(1, 8, blocks=[4, 9], num_computed_tokens=7)],
            forks=[Fork(1, 2, 1, [5, 3], 8)],
            copies=[(4, 5)],
            block_rows=[1, 2, 1],
            block_ids=[6, 7, 8],
            rows=[1, 2],
            counts=[1, 1],
        )
    )
    tables = [target.block_tables[slot, : target.num_blocks[slot]] for slot in scheduled.slots]
    assert [table.tolist() for table in tables] == [[4, 9, 6, 8], [5, 3, 7]]


def test_a_fork_has_its_parents_tokens_and_a_sample_index_of_its_own() -> None:
    target = batch()
    run(target, [60], new_rows=[new_row(1, seed=9)], rows=[1], counts=[5])
    target.apply(plan(forks=[Fork(1, 2, 3, [8, 9], 6)]))
    parent, child = target.slot_of(1), target.slot_of(2)
    assert target.token_ids[child, :6].tolist() == [0, 1, 2, 3, 4, 60]
    assert target.num_computed[child] == target.num_computed[parent] == 5
    assert target.params[child]["sample_index"] == 3
    assert target.params[parent]["sample_index"] == 0
    assert run(target, [61, 62], rows=[1, 2], counts=[1, 1]) == [RowEnd.NONE] * 2
    assert target.token_ids[parent, 6] == 61
    assert target.token_ids[child, 6] == 62


def test_a_fork_may_leave_its_parent_earlier_or_go_on_otherwise_and_outlives_its_end() -> None:
    target = batch()
    assert run(target, [EOS], new_rows=[new_row(1)], rows=[1], counts=[5]) == [RowEnd.EOS]
    of_prompt, other = Fork(1, 2, 1, [8, 9], 5), Fork(1, 3, 2, [6, 7], 5, [44])
    scheduled = target.apply(plan(forks=[of_prompt, other], rows=[1, 2, 3], counts=[1, 1, 1]))
    children = [target.slot_of(2), target.slot_of(3)]
    assert scheduled.slots.tolist() == children  # the parent is dead
    assert scheduled.samples.all()
    assert target.num_tokens[children].tolist() == [5, 6]
    assert target.num_computed[children].tolist() == [4, 5]
    assert target.token_ids[children[1], :6].tolist() == [0, 1, 2, 3, 4, 44]


def test_the_router_may_choose_a_rows_last_token() -> None:
    target = batch()
    run(target, [60, 61], new_rows=[new_row(1), new_row(2)], rows=[1, 2], counts=[5, 5])
    target.apply(plan(forks=[Fork(2, 3, 1, [8, 9], 5, [44])], choices=[(2, 45)]))
    assert target.token_ids[target.slot_of(1), 5] == 60
    assert target.token_ids[target.slot_of(2), 5] == 45
    assert target.token_ids[target.slot_of(3), 5] == 44


def test_what_a_row_says_of_tokens_reaches_the_sampler_and_its_forks() -> None:
    target = batch()
    said = {"logit_bias": ((3, -1.5),), "allowed_token_ids": (3, 5)}
    run(target, [60], new_rows=[new_row(1, **said)], rows=[1], counts=[5])
    target.apply(plan(forks=[Fork(1, 2, 1, [8, 9], 6)], new_rows=[new_row(3), new_row(4)]))
    slots = np.array([target.slot_of(row) for row in (1, 2, 3)])
    rows = target.sampled_rows(Draws.next(slots))
    assert sorted(rows.biases) == sorted(rows.allowed) == [0, 1]
    for row in (0, 1):
        assert rows.biases[row].ids.tolist() == [3]
        assert rows.biases[row].values.tolist() == [-1.5]
        assert np.flatnonzero(rows.allowed[row]).tolist() == [3, 5]


def test_bad_words_are_banned_where_they_would_end() -> None:
    """Whether the tokens before came by themselves, from an earlier row or from a parent's."""
    target = batch()
    words = ((7,), (3, 60, 61), (60, 62), (60, 61, 63), (4, 64))
    run(target, [60], new_rows=[new_row(1, bad_words=words)], rows=[1], counts=[5])
    resumed = new_row(2, bad_words=words, output_ids=[60, 61])
    target.apply(plan(new_rows=[resumed], forks=[Fork(1, 3, 1, [8, 9], 5, [60])]))
    rows = target.sampled_rows(Draws.next(np.array([target.slot_of(row) for row in (1, 2, 3)])))
    # Of the prompt, which ends with 3 and 4, nothing is counted.
    assert rows.banned[0].tolist() == rows.banned[2].tolist() == [7, 62]
    assert rows.banned[1].tolist() == [7, 63]
    assert sample(torch.zeros(3, 100), rows).tolist() == [0, 0, 0]
    best = torch.zeros(3, 100)
    best[:, 62:64] = torch.tensor([2.0, 1.0])
    assert sample(best, rows).tolist() == [63, 62, 63]


def test_bad_words_beside_what_else_bans() -> None:
    target = batch()
    said = {"bad_words": ((5,), (6,)), "allowed_token_ids": (5, 6), "min_new_tokens": 2}
    run(target, [], new_rows=[new_row(1, **said), new_row(2, bad_words=((1, 2),))])
    rows = target.sampled_rows(Draws.next(np.array([target.slot_of(row) for row in (1, 2)])))
    assert sorted(rows.banned[0].tolist()) == [5, 6, EOS] and 1 not in rows.banned
    assert (
        sample(torch.zeros(2, 100), rows).tolist()[0] == 5
    )  # bans leave nothing: they don't count


def test_more_rows_than_expected_are_kept_intact() -> None:
    target = batch()
    rows = [new_row(index, index + 1, [index, index]) for index in range(8)]
    run(target, [], new_rows=rows[:2])
    target.apply(plan(removed=[0], new_rows=rows[2:]))
    assert len(target) == 7 and 0 not in target
    for row in rows[1:]:
        slot = target.slot_of(row.id)
        assert target.ids[slot] == row.id
        assert target.num_tokens[slot] == len(row.prompt_ids)
        assert target.block_tables[slot, : target.num_blocks[slot]].tolist() == row.block_ids
    assert len({target.slot_of(row.id) for row in rows[1:]}) == 7


def test_a_reset_forgets_every_row() -> None:
    target = batch()
    target.apply(plan(new_rows=[new_row(1)]))
    target.apply(plan(reset=True, new_rows=[new_row(2)]))
    assert 1 not in target and 2 in target


def test_a_row_sent_again_continues_with_its_output() -> None:
    target = batch()
    row = new_row(1, 3, output_ids=[10, 11], max_new_tokens=3)
    scheduled = target.apply(plan(new_rows=[row], rows=[1], counts=[5]))
    assert target.sampled_rows(target.draws(scheduled)).output_positions.tolist() == [2]
    assert target.advance(scheduled, np.array([12])).tolist() == [RowEnd.LENGTH]


# ------------------------------------------------------------------ ends


@pytest.mark.parametrize(
    ("sampling", "token", "end"),
    [
        ({}, 5, RowEnd.NONE),
        ({"max_new_tokens": 1}, 5, RowEnd.LENGTH),
        ({}, EOS, RowEnd.EOS),
        ({"max_new_tokens": 1}, EOS, RowEnd.EOS),
        ({"ignore_eos": True}, EOS, RowEnd.NONE),
        ({"ignore_eos": True, "max_new_tokens": 1}, EOS, RowEnd.LENGTH),
        ({"ignore_eos": True, "stop_token_ids": (EOS,)}, EOS, RowEnd.STOP_TOKEN),
        ({"stop_token_ids": (5, EOS)}, EOS, RowEnd.EOS),
        ({"stop_token_ids": (6, 5)}, 5, RowEnd.STOP_TOKEN),
        ({"stop_token_ids": (5,), "max_new_tokens": 1}, 5, RowEnd.STOP_TOKEN),
        ({"stop_token_ids": (6,)}, 5, RowEnd.NONE),
    ],
)
def test_ends(sampling: dict[str, Any], token: int, end: RowEnd) -> None:
    ends = run(batch(), [token], new_rows=[new_row(1, **sampling)], rows=[1], counts=[5])
    assert ends == [end]


def test_an_ended_row_is_dead_in_later_plans() -> None:
    target = batch()
    run(target, [EOS, 3], new_rows=[new_row(1), new_row(2)], rows=[1, 2], counts=[5, 5])
    # The router knows nothing of the end yet: it schedules the row and gives it blocks.
    scheduled = target.apply(plan(rows=[1, 2], counts=[1, 1], block_rows=[1], block_ids=[9]))
    assert target.ids[scheduled.slots].tolist() == [2]
    assert not len(target.apply(plan(rows=[1], counts=[9])).slots)


def test_min_new_tokens_bans_what_would_end_the_row() -> None:
    target = batch()
    rows = [
        new_row(1, min_new_tokens=1, stop_token_ids=(7, 5000)),
        new_row(2, min_new_tokens=1, stop_token_ids=(8,), ignore_eos=True),
        new_row(3, stop_token_ids=(8,)),
    ]
    scheduled = target.apply(plan(new_rows=rows, rows=[1, 2, 3], counts=[5, 5, 5]))
    sampled = target.sampled_rows(target.draws(scheduled))
    assert {row: ids.tolist() for row, ids in sampled.banned.items()} == {0: [7, EOS], 1: [8]}
    assert target.plain[scheduled.slots].tolist() == [False, False, True]
    target.advance(scheduled, np.array([1, 1, 1]))
    assert not target.sampled_rows(target.draws(scheduled)).banned


def test_a_minimum_of_tokens_without_an_end_forbids_nothing() -> None:
    target = batch()
    row = new_row(1, min_new_tokens=1, ignore_eos=True)
    scheduled = target.apply(plan(new_rows=[row], rows=[1], counts=[5]))
    assert target.plain[scheduled.slots].all()
    assert not target.sampled_rows(target.draws(scheduled)).banned


def test_the_sampler_sees_the_history_of_penalised_rows_only() -> None:
    target = batch()
    rows = [new_row(1, 2), new_row(2, 3, output_ids=[50], presence_penalty=1.0)]
    scheduled = target.apply(plan(new_rows=rows, rows=[1, 2], counts=[2, 4]))
    sampled = target.sampled_rows(target.draws(scheduled))
    assert list(sampled.histories) == [1]
    assert sampled.histories[1].token_ids.tolist() == [0, 1, 2, 50]
    assert sampled.histories[1].num_prompt == 3


# ------------------------------------------------------------------ prompt logprobs


def test_prompt_chunks_meet_without_gap_or_overlap() -> None:
    target = batch()
    rows = [new_row(1, 7, prompt_logprobs=True, prompt_top_n_tokens=2), new_row(2, 2, [9])]
    places: list[tuple[int, int]] = []
    for counts in ([3], [3], [1]):
        scheduled = target.apply(plan(new_rows=rows, rows=[2, 1][-len(counts) :], counts=counts))
        inputs = build_inputs(target, scheduled, "cpu")
        for chunk in inputs.prompt_chunks:
            assert (chunk.row_id, chunk.top_n) == (1, 2)
            wanted = inputs.wanted_tokens[chunk.first : chunk.first + len(chunk.targets)]
            assert chunk.first == inputs.num_samples
            assert (inputs.positions[wanted] + 1).tolist() == chunk.targets.tolist()
            places += enumerate(chunk.targets.tolist(), chunk.start)
        target.advance(scheduled, np.array([50] * int(scheduled.samples.sum())))
        rows = []
    assert places == [(position, position) for position in range(1, 7)]


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rows": [5], "counts": [1]}, "row 5 is unknown"),
        ({"block_rows": [5], "block_ids": [1]}, "row 5 is unknown"),
        ({"block_rows": [1], "block_ids": [20]}, "row 1 refers to block 20 of 20"),
        ({"block_rows": [1], "block_ids": []}, "0 new blocks for 1 rows"),
        ({"block_rows": [1] * 9, "block_ids": [0] * 9}, "row 1 gets more blocks"),
        ({"copies": [(1, 20)]}, "a block copy refers to block 20"),
        ({"forks": [Fork(5, 6, 1, [], 5)]}, "row 5 is unknown"),
        ({"forks": [Fork(1, 1, 1, [0, 1], 5)]}, "row 1 is already here"),
        ({"forks": [Fork(1, 2, 1, [0, 1], 6)]}, "a fork, shares 6 tokens of 5"),
        ({"forks": [Fork(1, 2, 1, [0, 1], 4)]}, "a fork, has 4 tokens of a prompt of 5"),
        ({"forks": [Fork(1, 2, 1, [0, 1], 5, [9])]}, "a fork, begins with tokens whose KV"),
        ({"forks": [Fork(1, 2, 1, [], 5)]}, "a fork, has fewer blocks"),
        ({"forks": [Fork(1, 2, 1, [0, 1], 4, [100])]}, "a fork, holds a token outside"),
        ({"choices": [(5, 1)]}, "row 5 is unknown"),
        ({"choices": [(1, 1)]}, "row 1 has no last token that could be replaced"),
        ({"choices": [(1, 100)]}, "row 1 gets a token outside the vocabulary"),
        ({"rows": [1], "counts": [2]}, "row 1 is scheduled for tokens that are not known"),
        ({"rows": [1], "counts": [0]}, "row 1 is scheduled for no token"),
        ({"rows": [1, 1], "counts": [1, 1]}, "scheduled twice"),
        ({"rows": [1], "counts": []}, "0 counts for 1 rows"),
        ({"new_rows": [new_row(1)]}, "row 1 is already here"),
        ({"new_rows": [new_row(2, 0)]}, "row 2 has no prompt"),
        ({"new_rows": [new_row(2, prompt_ids=[100])]}, "outside the vocabulary"),
        ({"new_rows": [new_row(2, output_ids=[1] * 4)]}, "has all of its 4 tokens"),
        ({"new_rows": [new_row(2, 29)]}, "may grow beyond 32 tokens"),
        ({"new_rows": [new_row(2, num_computed_tokens=5)]}, "5 of its 5 tokens computed"),
        ({"new_rows": [new_row(2, blocks=[], num_computed_tokens=4)]}, "its 0 blocks hold"),
        ({"new_rows": [new_row(2, adapter_id="x")]}, "adapter 'x'"),
        ({"new_rows": [new_row(2, temperature=float("nan"))]}, "not a number"),
        ({"new_rows": [new_row(2, top_n_tokens=101)]}, "more alternatives"),
        ({"new_rows": [new_row(2, logit_bias=((100, 1.0),))]}, "token outside the vocabulary"),
        ({"new_rows": [new_row(2, logit_bias=((1, float("inf")),))]}, "not a number"),
        ({"new_rows": [new_row(2, allowed_token_ids=(100,))]}, "token outside the vocabulary"),
        ({"new_rows": [new_row(2, bad_words=((1, 100),))]}, "token outside the vocabulary"),
        ({"new_rows": [new_row(2, bad_words=((),))]}, "a bad word of no tokens"),
        (
            {"new_rows": [new_row(2, allowed_token_ids=(1,), grammar="{}")]},
            "a grammar and a list of allowed tokens",
        ),
        (
            {"new_rows": [new_row(2, 9)], "rows": [2], "counts": [9]},
            "row 2 is scheduled for more tokens than its blocks hold",
        ),
        (
            {"new_rows": [new_row(2, 25, list(range(7)))], "rows": [2], "counts": [25]},
            "25 tokens in one step, and 24 are the most",
        ),
    ],
)
def test_what_does_not_fit_is_refused(fields: dict[str, Any], message: str) -> None:
    target = batch()
    target.apply(plan(new_rows=[new_row(1, num_computed_tokens=4)]))
    with pytest.raises(PlanError, match=message):
        target.apply(plan(**fields))
