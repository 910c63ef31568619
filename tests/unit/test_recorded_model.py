"""Steps that are replayed: the model's own bits, heartbeats, and models that can't be."""

from __future__ import annotations

import logging
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from headgate.kernels import ops
from headgate.kernels.cpu import library
from headgate.proto.messages import NewRow, RowSampling, StepPlan, StepResult
from headgate.shard.config import ShardIdentity
from headgate.shard.distributed import Group, SharedMemoryGroup, single_group
from headgate.shard.layers.embedding import VocabHead
from headgate.shard.model_runner import ModelRunner
from headgate.shard.models.base import CausalLM
from headgate.shard.models.registry import load_model
from headgate.shard.recorded_model import RecordedModel
from headgate.shard.step_rows import SettledTokens, StepRows
from tests.checkpoints import make_checkpoint
from tests.unit.fake_model import shard_config
from tests.unit.shard_threads import groups_of_threads

PROMPT = list(b"a quick brown fox")
LOG = "headgate.shard.recorded_model"


@pytest.fixture(autouse=True)
def all_by_cpp(cpu_kernels: None) -> None:
    """All tests here."""


def load(path: Path) -> CausalLM:
    return load_model(path, dtype="bfloat16", device="cpu", group=single_group())


def make_runner(model: CausalLM) -> ModelRunner:
    return ModelRunner(model, single_group(), shard_config(), ShardIdentity(0, 1, epoch=1))


def generate(runner: ModelRunner, **sampling: Any) -> list[StepResult]:
    """Two rows, the second one coming later and in chunks."""
    sampling = {"max_new_tokens": 20, "ignore_eos": True, "logprobs": True, **sampling}
    runner.allocate(40)
    first, second = (
        NewRow(i, PROMPT * (1 + i), RowSampling(**sampling), block_ids=range(20 * i, 20 * i + 20))
        for i in (0, 1)
    )
    steps: list[dict[str, Any]] = [
        {"new_rows": [first], "rows": [0], "counts": [len(PROMPT)]},
        {"new_rows": [second], "rows": [0, 1], "counts": [1, 20]},
        {"rows": [1, 0], "counts": [len(PROMPT) * 2 - 20, 1]},
        *[{"rows": [0, 1], "counts": [1, 1]}] * 9,
    ]
    return [
        runner.step(StepPlan(epoch=1, sequence=number, **step))
        for number, step in enumerate(steps, 1)
    ]


def forwards_of(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for each forward that the model itself computes."""
    counted: list[int] = []
    forward = model.forward

    def count(input_ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        counted.append(len(input_ids))
        return forward(input_ids, *rest)

    monkeypatch.setattr(model, "forward", count)
    return counted


def test_replayed_steps_give_the_models_results(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = load(tiny_llama)
    runner = make_runner(model)
    wishes = ({}, {"temperature": 0.8, "seed": 3, "prompt_logprobs": True, "top_n_tokens": 2})
    expected = [generate(runner, **wish) for wish in wishes]
    with caplog.at_level(logging.INFO, LOG):
        runner.record()
    assert "steps are replayed" in caplog.text
    forwards = forwards_of(model, monkeypatch)
    for wish, results in zip(wishes, expected, strict=True):
        before = runner.heartbeat.beats
        got = generate(runner, **wish)
        for ours, theirs in zip(got, results, strict=True):
            assert (ours.token_ids, ours.logprobs) == (theirs.token_ids, theirs.logprobs)
            assert (ours.top, ours.prompt_logprobs) == (theirs.top, theirs.prompt_logprobs)
        assert runner.heartbeat.beats - before > len(got) * model.num_layers
    assert not forwards, "the model's own code did not run"


def decode(runner: ModelRunner, row_sampling: list[RowSampling]) -> list[StepResult]:
    """A row for each sampling, given blocks as it needs them; until step 14 all are planned."""
    block, room = runner.config.block_size, 12  # blocks of a row
    runner.allocate(len(row_sampling) * room)
    known = [1 + row % 7 for row in range(len(row_sampling))]
    new = [
        NewRow(row, PROMPT[:length], sampling, block_ids=range(row * room, row * room + 2))
        for row, (length, sampling) in enumerate(zip(known, row_sampling, strict=True))
    ]
    rows, results = list(range(len(new))), []
    for number in range(1, 15):
        step: dict[str, Any] = {"new_rows": new, "counts": known}
        if number > 1:
            known = [length + 1 for length in known]
            grown = [row for row in rows if known[row] > 2 * block and known[row] % block == 1]
            ids = [row * room + known[row] // block for row in grown]
            step = {"counts": [1] * len(rows), "block_rows": grown, "block_ids": ids}
        results.append(runner.step(StepPlan(1, number, rows, **step)))
    return results


def test_rows_laid_out_by_cpp_get_the_same(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tiny_llama)
    config = shard_config(max_batch_prefill_tokens=300, max_batch_size=70)
    runner = ModelRunner(model, single_group(), config, ShardIdentity(0, 1, epoch=1))
    runner.record()
    greedy = RowSampling(40, ignore_eos=True)
    model.config = replace(model.config, eos_token_ids=(decode(runner, [greedy])[9].token_ids[0],))
    batches = [
        [greedy, replace(greedy, ignore_eos=False), replace(greedy, max_new_tokens=5)],
        [greedy, replace(greedy, temperature=0.8, seed=3), replace(greedy, logprobs=True)],
        [greedy, replace(greedy, stop_token_ids=(7,))],
        [greedy] * 70,  # more than the rows whose logits come with a step
    ]
    settled = StepRows.settle
    for expected_fast, batch in zip((14, 14, 0, 14), batches, strict=True):
        fast: list[int] = []

        def settle(rows: StepRows, sampled_at: int, fast: list[int] = fast) -> SettledTokens:
            fast.append(len(rows))
            return settled(rows, sampled_at)

        with monkeypatch.context() as patched:
            patched.setattr(StepRows, "settle", settle)
            got = decode(runner, batch)
        with monkeypatch.context() as patched:
            patched.setattr(StepRows, "place", lambda *_: False)
            expected = decode(runner, batch)
        assert [without_times(result) for result in got] == [*map(without_times, expected)]
        assert len(fast) == expected_fast


class RandomPlans:
    """Rows that come, compute their prompts in pieces, decode with guesses, and go again."""

    WISHES: tuple[dict[str, Any], ...] = (
        *[{}] * 12,
        {"temperature": 0.8, "seed": 3},
        {"logprobs": True},
        {"stop_token_ids": (7, 9, 11)},
        {"prompt_logprobs": True},
    )
    BLOCKS = 20  # of a row

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._waiting: dict[int, int] = {}  # tokens of the prompt yet to be computed, by row
        self._decoding: list[int] = []
        self._next = 0

    def plan(self, sequence: int) -> StepPlan:
        chance = self._random
        new = [self._new_row() for _ in range(chance.choice((0, 0, 1, 2)))]
        rows = [*self._decoding, *self._waiting]
        removed = [row for row in self._decoding if chance.random() < 0.1]
        rows = [row for row in rows if row not in removed]
        counts = [
            chance.randint(1, self._waiting[row]) if row in self._waiting else 1 for row in rows
        ]
        self._decoding = [row for row in rows if row not in self._waiting]
        for row, count in zip(rows, counts, strict=True):
            if row in self._waiting:
                self._waiting[row] -= count
                if not self._waiting[row]:
                    del self._waiting[row]
                    self._decoding.append(row)
        drafts = [4] * len(rows) if chance.random() < 0.7 else []
        return StepPlan(
            1, sequence, rows, counts, drafts, chance.randint(0, 9), new_rows=new, removed=removed
        )

    def _new_row(self) -> NewRow:
        row, self._next = self._next, self._next + 1
        prompt = PROMPT * self._random.randint(1, 3)
        self._waiting[row] = len(prompt)
        sampling = RowSampling(
            self._random.randint(1, 25),
            ignore_eos=self._random.random() < 0.7,
            **self._random.choice(self.WISHES),
        )
        blocks = range(row % 30 * self.BLOCKS, (row % 30 + 1) * self.BLOCKS)
        return NewRow(row, prompt, sampling, block_ids=blocks)


@pytest.mark.parametrize("seed", [1, 2])
def test_plans_of_all_kinds_get_the_same_by_cpp(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """And leave the same rows behind them."""
    model = load(tiny_llama)
    config = shard_config(max_batch_prefill_tokens=300, max_batch_size=4)  # rows make it grow
    runner = ModelRunner(model, single_group(), config, ShardIdentity(0, 1, epoch=1))
    runner.record()
    chance = RandomPlans(seed)
    plans = [chance.plan(number) for number in range(1, 60)]
    placed, taken = StepRows.place, [0, 0]

    def place(rows: StepRows, plan: StepPlan) -> bool:
        found = placed(rows, plan)
        taken[found] += 1
        return found

    def outcomes() -> list[tuple[StepResult, list[list[int]]]]:
        runner.allocate(30 * RandomPlans.BLOCKS)
        steps = []
        for plan in plans:
            result = runner.step(plan)
            assert not result.refused
            batch = runner._batch
            assert batch is not None
            held = [batch.slot_of(row) for row in plan.rows]
            columns = (batch.num_tokens, batch.num_computed, batch.ended)
            state = [column[held].tolist() for column in columns]
            known = zip(batch.token_ids[held], batch.num_tokens[held], strict=True)
            state += [ids[:count].tolist() for ids, count in known]
            steps.append((without_times(result), state))
        return steps

    with monkeypatch.context() as patched:
        patched.setattr(StepRows, "place", place)
        got = outcomes()
    assert min(taken) > 5
    with monkeypatch.context() as patched:
        patched.setattr(StepRows, "place", lambda *_: False)
        expected = outcomes()
    assert got == expected
    assert any(result.num_drafts for result, _ in got)


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_plain_rows_get_the_likeliest_tokens_of_all_logits(tmp_path: Path, precision: str) -> None:
    """By a shortlist, which a head of the embedding's weights has, in steps and beyond them."""
    path = make_checkpoint(tmp_path / "tied", tie_word_embeddings=True)
    model = load_model(
        path, dtype="bfloat16", device="cpu", group=single_group(), precision=precision
    )
    config = shard_config(max_batch_prefill_tokens=300, max_batch_size=70)
    runner = ModelRunner(model, single_group(), config, ShardIdentity(0, 1, epoch=1))
    runner.record()
    assert isinstance(runner.recorded, RecordedModel)
    greedy = RowSampling(40, ignore_eos=True)
    for rows in (3, 70):  # all of whose logits come with a step, or some
        plain = decode(runner, [greedy] * rows)
        whole = decode(runner, [replace(greedy, logprobs=True)] * rows)
        assert [result.token_ids for result in plain] == [result.token_ids for result in whole]


def test_shards_find_the_likeliest_tokens_together(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "tied", tie_word_embeddings=True)
    loaded = library.load()
    assert loaded is not None
    greedy = RowSampling(40, ignore_eos=True)

    def tokens(group: Group) -> list[list[int]]:
        model = load_model(path, dtype="bfloat16", device="cpu", group=group)
        assert isinstance(model.head, VocabHead)
        assert (model.head.shortlist is not None) == bool(loaded.hg_multiplies_bytes())
        identity = ShardIdentity(group.rank, group.world_size, epoch=1)
        config = shard_config(max_batch_prefill_tokens=300, max_batch_size=70)
        runner = ModelRunner(model, group, config, identity)
        runner.record()
        assert isinstance(runner.recorded, RecordedModel)
        batches = [[row] * count for count in (3, 70) for row in (greedy, with_logprobs)]
        return [list(step.token_ids) for batch in batches for step in decode(runner, batch)]

    with_logprobs = replace(greedy, logprobs=True)
    with ThreadPoolExecutor(2) as pool:
        of_two, nothing = pool.map(tokens, groups_of_threads(2))
    assert any(of_two) and not any(nothing)
    few, many = of_two[: len(of_two) // 2], of_two[len(of_two) // 2 :]
    for steps in (few, many):
        plain, whole = steps[: len(steps) // 2], steps[len(steps) // 2 :]
        assert plain == whole


def without_times(result: StepResult) -> StepResult:
    return replace(result, forward_ns=0, total_ns=0, top=list(result.top), pooled=())


def test_activations_share_memory(tiny_llama: Path) -> None:
    runner = make_runner(load(tiny_llama))
    runner.record()
    assert isinstance(runner.recorded, RecordedModel)
    planned, apart = runner.recorded.activation_bytes
    assert planned < apart / 2  # of two layers, not more


def doubled(model: CausalLM) -> None:
    head = model.head
    model.head = lambda hidden: head(hidden * 2)  # type: ignore[assignment,return-value]


def normed_twice(model: CausalLM) -> None:
    """In steps of more than 10 tokens, which recordings are not."""
    forward = model.forward

    def changed(input_ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        hidden = forward(input_ids, *rest)
        if len(input_ids) > 10:
            hidden = ops.rms_norm(hidden, torch.ones(hidden.shape[1]), 1e-5)
        return hidden

    model.forward = changed  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (doubled, "it calls aten.mul.Tensor of torch"),
        (normed_twice, "a replay of 16 tokens differs from the model's own step"),
    ],
)
def test_models_that_cannot_be_replayed_run_as_they_are(
    tiny_llama: Path, caplog: pytest.LogCaptureFixture, change: Any, reason: str
) -> None:
    model = load(tiny_llama)
    change(model)
    runner = make_runner(model)
    expected = generate(runner)
    with caplog.at_level(logging.INFO, LOG):
        runner.record()
    assert caplog.messages == [f"steps are not replayed: {reason}"]
    results = generate(runner)
    assert [r.token_ids for r in results] == [r.token_ids for r in expected]


@pytest.mark.parametrize("change", [doubled, normed_twice])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_shard_that_alone_cannot_be_replayed(
    tiny_llama: Path, caplog: pytest.LogCaptureFixture, change: Any, rank: int
) -> None:
    """All of them give up, with no collective that only some of them make."""

    def steps_of(group: SharedMemoryGroup) -> list[list[int]]:
        model = load_model(tiny_llama, dtype="bfloat16", device="cpu", group=group)
        if group.rank == rank:
            change(model)
        runner = ModelRunner(model, group, shard_config(), ShardIdentity(group.rank, 2, epoch=1))
        runner.record()
        assert runner.recorded is None
        return [list(result.token_ids) for result in generate(runner)]

    with caplog.at_level(logging.INFO, LOG), ThreadPoolExecutor(2) as pool:
        tokens, nothing = pool.map(steps_of, groups_of_threads(2))
    assert any(tokens) and not any(nothing)
    assert len(caplog.messages) == 2
    assert all(message.startswith("steps are not replayed: ") for message in caplog.messages)


def test_more_rows_than_logits_at_once(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of the first come with the step, the others after it."""
    model = load(tiny_llama)
    runner = make_runner(model)
    expected = generate(runner, max_new_tokens=4)
    assert any(len(result.rows) > 1 for result in expected)
    monkeypatch.setattr("headgate.shard.samplers.LOGITS_ROWS", 1)
    runner.record()
    assert isinstance(runner.recorded, RecordedModel)
    results = generate(runner, max_new_tokens=4)
    assert [r.logprobs for r in results] == [r.logprobs for r in expected]
    assert [r.token_ids for r in results] == [r.token_ids for r in expected]


def test_other_kernels_are_not_recorded(tiny_llama: Path, reference_kernels: None) -> None:
    runner = make_runner(load(tiny_llama))
    runner.record()
    assert runner.recorded is None
