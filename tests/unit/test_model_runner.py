"""ModelRunner over a fake model: tokens, logprobs, refusals, ranks; and over a tiny real one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from headgate.kernels import cpu, ops
from headgate.kernels.huge_pages import take_pages
from headgate.proto.messages import Fork, NewRow, RowEnd, RowSampling, StepPlan, StepResult
from headgate.shard import model_runner, samplers, vote, warmup
from headgate.shard.config import KV_DTYPES, ShardIdentity
from headgate.shard.distributed import Group, single_group
from headgate.shard.errors import ModelError
from headgate.shard.kv_cache import KVCache, KVCacheLayout
from headgate.shard.model_runner import ModelRunner
from headgate.shard.models.registry import load_model
from tests import triton_interpreter
from tests.parity.paged import PagedRows
from tests.unit.fake_model import FakeModel, greedy, logits_after, shard_config

BLOCKS = 40


class Driver:
    """A runner and the numbering of its plans."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self.sequence = 0

    def __call__(self, **fields: Any) -> StepResult:
        self.sequence += 1
        return self.runner.step(StepPlan(epoch=1, sequence=self.sequence, **fields))


def make_runner(model: Any = None, group: Group | None = None, **config: Any) -> ModelRunner:
    group = group or single_group()
    identity = ShardIdentity(group.rank, group.world_size, epoch=1)
    runner = ModelRunner(model or FakeModel(group), group, shard_config(**config), identity)
    runner.allocate(BLOCKS)
    return runner


@pytest.fixture
def step() -> Driver:
    return Driver(make_runner())


def row(row_id: int, prompt: Sequence[int], blocks: Sequence[int], **sampling: Any) -> NewRow:
    output = sampling.pop("output_ids", ())
    sampling.setdefault("max_new_tokens", 50)
    return NewRow(row_id, prompt, RowSampling(**sampling), output_ids=output, block_ids=blocks)


PROMPT = [3, 14, 15, 92, 65, 35]


# ------------------------------------------------------------------ tokens


def test_greedy_tokens_one_plan_ahead(step: Driver) -> None:
    blocks = range(8, 16)
    tokens = list(step(new_rows=[row(1, PROMPT, blocks)], rows=[1], counts=[6]).token_ids)
    # No plan below says which token it continues from: the shard knows.
    for _ in range(20):
        tokens += step(rows=[1], counts=[1]).token_ids
    assert tokens == greedy(PROMPT, 21)


@pytest.mark.parametrize("chunk", [1, 2, 4, 5])
def test_chunks_of_a_prompt_sample_once_at_its_end(step: Driver, chunk: int) -> None:
    result = step(new_rows=[row(1, PROMPT, [0, 1, 2])])
    assert result.rows == ()
    left = len(PROMPT)
    while left:
        assert list(result.rows) == []
        count = min(chunk, left)
        result = step(rows=[1], counts=[count])
        left -= count
    assert (result.rows, result.token_ids) == ([1], greedy(PROMPT, 1))


def test_rows_of_all_kinds_in_one_step(step: Driver) -> None:
    other = [80, 70, 60]
    step(new_rows=[row(1, PROMPT, [0, 1, 2])], rows=[1], counts=[6])
    result = step(
        new_rows=[row(2, other, [5]), row(3, PROMPT, [7, 8])],
        rows=[3, 1, 2],
        counts=[2, 1, 3],
    )
    assert result.rows == [1, 2]  # row 3 is in mid-prompt
    assert result.token_ids == [greedy(PROMPT, 2)[1], *greedy(other, 1)]
    assert result.ends == [RowEnd.NONE] * 2


def test_a_preempted_row_goes_on_with_the_same_tokens(step: Driver) -> None:
    for sampling in ({}, {"temperature": 1.0, "seed": 4}):
        first = list(
            step(new_rows=[row(1, PROMPT, range(9), **sampling)], rows=[1], counts=[6]).token_ids
        )
        for _ in range(9):
            first += step(rows=[1], counts=[1]).token_ids
        again = row(1, PROMPT, range(20, 28), output_ids=first[:4], **sampling)
        second = list(step(removed=[1], new_rows=[again], rows=[1], counts=[10]).token_ids)
        for _ in range(5):
            second += step(rows=[1], counts=[1]).token_ids
        assert first[:4] + second == first
        step(removed=[1])


def test_a_cached_prefix_is_not_computed_again(step: Driver) -> None:
    step(new_rows=[row(1, PROMPT, [0, 1])], rows=[1], counts=[6])
    cached = NewRow(2, PROMPT, RowSampling(5), num_computed_tokens=4, block_ids=[0, 9])
    result = step(new_rows=[cached], rows=[2], counts=[2])
    assert result.token_ids == greedy(PROMPT, 1)
    assert step.runner.model.batches == [6, 2]  # type: ignore[attr-defined]


def test_forked_rows_share_blocks_until_they_are_copied(step: Driver) -> None:
    step(new_rows=[row(1, PROMPT, [0, 1])], rows=[1], counts=[5])
    # The second block is half full: the child writes into a copy of it.
    result = step(forks=[Fork(1, 2, 1, [0, 5], 6)], copies=[(1, 5)], rows=[2, 1], counts=[1, 1])
    assert result.token_ids == greedy(PROMPT, 1) * 2
    assert step(rows=[1, 2], counts=[1, 1]).token_ids == [greedy(PROMPT, 2)[1]] * 2


def test_ends_are_told_and_the_row_is_dead(step: Driver) -> None:
    stop = greedy(PROMPT, 3)[2]
    rows = [
        row(1, PROMPT, [0, 1, 2], max_new_tokens=2),
        row(2, PROMPT, [3, 4, 5], stop_token_ids=(stop,)),
    ]
    ends = [step(new_rows=rows, rows=[1, 2], counts=[6, 6]).ends]
    for _ in range(3):
        ends.append(step(rows=[1, 2], counts=[1, 1]).ends)
    none = RowEnd.NONE
    assert ends == [[none, none], [RowEnd.LENGTH, none], [RowEnd.STOP_TOKEN], ()]
    assert len(step.runner.model.batches) == 3  # type: ignore[attr-defined]


def test_min_new_tokens(step: Driver) -> None:
    first = greedy(PROMPT, 1)[0]
    entry = row(1, PROMPT, [0, 1], stop_token_ids=(first,), min_new_tokens=1)
    result = step(new_rows=[entry], rows=[1], counts=[6])
    assert result.token_ids == logits_after(PROMPT).topk(2).indices.tolist()[1:]
    assert result.ends == [RowEnd.NONE]


# ------------------------------------------------------------------ logprobs


@pytest.fixture
def few_logits(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(samplers, "LOGITS_ROWS", 3)
    return 3


def test_logprobs_and_alternatives_of_rows_that_ask(step: Driver, few_logits: int) -> None:
    asks = [
        {},
        {"logprobs": True},
        {"top_n_tokens": 2},
        {},
        {"logprobs": True, "top_n_tokens": 4},
        {},
        {"temperature": 1.5, "seed": 1, "presence_penalty": 2.0, "logprobs": True},
    ]
    prompts = [[index + 1, 50] for index in range(len(asks))]
    rows = [
        row(index, prompt, [index], **ask)
        for index, (prompt, ask) in enumerate(zip(prompts, asks, strict=True))
    ]
    result = step(new_rows=rows, rows=range(7), counts=[2] * 7)
    assert step.runner.model.largest_logits == few_logits  # type: ignore[attr-defined]
    assert [len(places.ids) for places in result.top] == [0, 0, 2, 0, 4, 0, 0]
    for index, ask in enumerate(asks):
        expected = logits_after(prompts[index]).log_softmax(0)
        if ask:
            assert result.logprobs[index] == pytest.approx(
                float(expected[result.token_ids[index]]), abs=1e-5
            )
        else:
            assert result.logprobs[index] == 0
        if ask.get("top_n_tokens"):
            best = expected.topk(int(ask["top_n_tokens"]))
            assert result.top[index].ids == best.indices.tolist()
            assert result.top[index].logprobs == pytest.approx(best.values.tolist(), abs=1e-5)


def test_no_alternatives_where_no_row_asks(step: Driver) -> None:
    result = step(new_rows=[row(1, PROMPT, [0, 1], logprobs=True)], rows=[1], counts=[6])
    assert result.top == []


@pytest.mark.parametrize("chunk", [1, 4, 30])
def test_prompt_logprobs_chunk_by_chunk(step: Driver, few_logits: int, chunk: int) -> None:
    prompt = list(range(10, 30))
    entry = row(1, prompt, range(6), prompt_logprobs=True, prompt_top_n_tokens=2)
    values: dict[int, float] = {}
    top: list[list[int]] = []
    step(new_rows=[entry])
    done = 0
    while done < len(prompt):
        count = min(chunk, len(prompt) - done)
        result = step(rows=[1], counts=[count])
        done += count
        for found in result.prompt_logprobs:
            assert found.row == 1
            values.update(enumerate(found.logprobs, found.start))
            top += [list(places.ids) for places in found.top]
    assert list(values) == list(range(1, 20))
    expected = [logits_after(prompt[:position]).log_softmax(0) for position in range(1, 20)]
    assert list(values.values()) == pytest.approx(
        [float(line[prompt[place + 1]]) for place, line in enumerate(expected)], abs=1e-5
    )
    assert top == [line.topk(2).indices.tolist() for line in expected]
    assert result.token_ids == greedy(prompt, 1)
    assert step(rows=[1], counts=[1]).prompt_logprobs == ()


# ------------------------------------------------------------------ refusals


def test_after_a_refusal_only_a_reset_helps(step: Driver) -> None:
    step(new_rows=[row(1, PROMPT, [0, 1])], rows=[1], counts=[6])
    refused = step(rows=[1, 9], counts=[1, 1])
    assert refused.refused == "shard 0: row 9 is unknown"
    assert (refused.epoch, refused.sequence, refused.rows) == (1, 2, ())
    assert "resync needed" in step(rows=[1], counts=[1]).refused
    again = row(1, PROMPT, [2, 3], output_ids=greedy(PROMPT, 1))
    result = step(reset=True, new_rows=[again], rows=[1], counts=[7])
    assert result.token_ids == greedy(PROMPT, 2)[1:]


def test_plans_of_another_epoch_or_out_of_order_are_refused(step: Driver) -> None:
    assert "epoch 2" in step.runner.step(StepPlan(epoch=2, sequence=1)).refused
    step.runner.reset()
    assert not step().refused
    step.sequence += 1
    assert "plan 3 after plan 1" in step().refused
    step.runner.reset()  # a new stream may begin anywhere
    assert not step().refused


def test_a_plan_before_allocate_is_refused() -> None:
    runner = ModelRunner(FakeModel(), single_group(), shard_config(), ShardIdentity(0, 1, 1))  # type: ignore[arg-type]
    assert "before Allocate" in runner.step(StepPlan(1, 1)).refused


def test_lack_of_memory_before_the_forward_is_a_refusal(
    step: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(model_runner, "build_inputs", fail)
    result = step(new_rows=[row(1, PROMPT, [0, 1])], rows=[1], counts=[6])
    assert result.refused == "shard 0: out of memory"


# ------------------------------------------------------------------ ranks


class ThreadGroup(Group):
    """Ranks that are threads of one process."""

    def __init__(self, rank: int, barrier: threading.Barrier, board: list[Any]) -> None:
        super().__init__(rank, barrier.parties)
        self._barrier, self._board = barrier, board

    def _exchange(self, value: torch.Tensor) -> list[torch.Tensor]:
        self._board[self.rank] = value.clone()
        self._barrier.wait(10)
        values = list(self._board)
        self._barrier.wait(10)
        return values

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.copy_(torch.stack(self._exchange(tensor)).sum(0))

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.copy_(self._exchange(tensor)[0])


class Ranks:
    """Two runners, each on its thread."""

    def __init__(self) -> None:
        barrier, board = threading.Barrier(2), [None, None]
        self.runners = [make_runner(group=ThreadGroup(rank, barrier, board)) for rank in (0, 1)]
        self._pool = ThreadPoolExecutor(2)

    def run(self, *jobs: Callable[[], Any]) -> list[Any]:
        return [future.result(30) for future in [self._pool.submit(job) for job in jobs]]

    def step(self, *plans: StepPlan) -> list[StepResult]:
        """One plan for both, or one for each."""
        first, second = plans * 2 if len(plans) == 1 else plans
        return self.run(lambda: self.runners[0].step(first), lambda: self.runners[1].step(second))


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    yield Ranks()


def test_all_ranks_hold_the_tokens_that_rank_0_sampled(ranks: Ranks) -> None:
    entry = row(1, PROMPT, range(4), temperature=1.0, seed=8, max_new_tokens=4)
    results = ranks.step(StepPlan(1, 1, new_rows=[entry], rows=[1], counts=[6]))
    for sequence in range(2, 6):
        results += ranks.step(StepPlan(1, sequence, rows=[1], counts=[1]))
    first, second = results[::2], results[1::2]
    assert all(not result.rows and not result.refused for result in second)
    assert [list(result.ends) for result in first] == [[0], [0], [0], [1], []]
    held = [runner._batch.token_ids[0, :10].tolist() for runner in ranks.runners]  # type: ignore[union-attr]
    assert held[0] == held[1]
    assert held[0][6:] == [token for result in first for token in result.token_ids]


def test_one_rank_that_refuses_makes_all_refuse(ranks: Ranks) -> None:
    entry = row(1, PROMPT, [0, 1])
    ranks.runners[1]._batch.apply(StepPlan(1, 1, new_rows=[entry]))  # type: ignore[union-attr]
    results = ranks.step(StepPlan(1, 1, new_rows=[entry], rows=[1], counts=[6]))
    assert [result.refused for result in results] == [
        "refused by shard 1",
        "shard 1: row 1 is already here",
    ]
    results = ranks.step(StepPlan(1, 2, reset=True, new_rows=[entry], rows=[1], counts=[6]))
    assert results[0].token_ids == greedy(PROMPT, 1)


def test_a_plan_that_one_rank_never_got_is_dropped(ranks: Ranks) -> None:
    """A router died after it had told shard 0 only; the next router's plan finds it waiting."""
    entry = row(1, PROMPT, [0, 1])
    stale = StepPlan(1, 17, new_rows=[row(7, PROMPT, [2, 3])], rows=[7], counts=[3])
    fresh = StepPlan(1, 1, new_rows=[entry], rows=[1], counts=[6])

    def rank_0() -> StepResult:
        with pytest.raises(vote.Superseded):
            ranks.runners[0].step(stale, lambda: False)
        ranks.runners[0].reset()
        return ranks.runners[0].step(fresh)

    result, _ = ranks.run(rank_0, lambda: ranks.runners[1].step(fresh))
    assert result.token_ids == greedy(PROMPT, 1)


def test_ranks_that_insist_on_different_plans_are_an_error(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vote, "_PATIENCE", 0.0)
    with pytest.raises(vote.PlansDiffer):
        ranks.step(StepPlan(1, 1), StepPlan(1, 2))


# ------------------------------------------------------------------ life


def test_heartbeat_counts_and_knows_when_a_step_runs(step: Driver) -> None:
    heartbeat = step.runner.heartbeat
    seen: list[bool] = []
    step.runner.model.heartbeat = lambda: (seen.append(heartbeat.busy), heartbeat.beat())  # type: ignore[assignment,func-returns-value]
    before = heartbeat.beats
    step(new_rows=[row(1, PROMPT, [0, 1])], rows=[1], counts=[6])
    assert seen == [True] and not heartbeat.busy
    assert heartbeat.beats > before


def test_warm_up_runs_steps_of_tokens_and_rows_and_leaves_nothing() -> None:
    runner = make_runner(max_total_tokens=30, max_batch_prefill_tokens=64)
    assert warmup.warm_up(runner, 64, 0) == runner.config.num_blocks
    assert runner.model.batches[-2:] == [32, 32]  # type: ignore[attr-defined]
    assert "before Allocate" in runner.step(StepPlan(1, 1)).refused
    runner.allocate(BLOCKS)
    entry = row(0, PROMPT, [0, 1], max_new_tokens=3)
    result = Driver(runner)(new_rows=[entry], rows=[0], counts=[6])
    assert result.token_ids == greedy(PROMPT, 1)


def test_a_cache_beyond_memory_is_one_sentence() -> None:
    with pytest.raises(ModelError, match="and there is not enough memory"):
        make_runner().allocate(2**48)


# ------------------------------------------------------------------ a real model


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "seed": 77, "top_p": 0.95}])
def test_tokens_do_not_depend_on_batch_or_chunks(
    tiny_llama: Path, sampling: dict[str, Any]
) -> None:
    model = load_model(tiny_llama, dtype="float32", device="cpu", group=single_group())
    prompt = list(b"The quick brown fox jumps over")
    entry = row(1, prompt, range(12), max_new_tokens=12, ignore_eos=True, **sampling)

    def generate(chunk: int, others: int) -> list[int]:
        step = Driver(make_runner(model))
        crowd = [
            row(9 + index, prompt[: index + 2], range(15 + 5 * index, 20 + 5 * index))
            for index in range(others)
        ]
        ids = [entry.id for entry in crowd]
        tokens: list[int] = []
        step(new_rows=crowd, rows=ids, counts=[len(other.prompt_ids) for other in crowd])
        step(new_rows=[entry])
        left = len(prompt)
        while len(tokens) < 12:
            count = min(chunk, left) if left else 1
            left -= count if left else 0
            result = step(rows=[*ids, 1], counts=[1] * others + [count])
            tokens += [t for r, t in zip(result.rows, result.token_ids, strict=True) if r == 1]
            if step.sequence == 9:
                step(removed=ids)
                ids, others = [], 0
        return tokens

    expected = generate(64, 0)
    assert generate(7, 0) == generate(64, 4) == generate(3, 5) == expected


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_keys_and_values_in_fewer_bits(tiny_llama: Path, backend: str) -> None:
    """Logits of a prompt in chunks and of a token after it, against those with float32."""
    before = ops.active()
    try:
        if backend == "cpu" and not cpu.available():
            pytest.skip("the C++ kernels are not built")
        if backend == "triton":
            triton_interpreter.quicken()
        ops.use(backend)
        model = load_model(tiny_llama, dtype="float32", device="cpu", group=single_group())

        def logits(name: str) -> torch.Tensor:
            rows = PagedRows(model, 1, 41, KV_DTYPES[name])
            for chunk in (range(1, 30), range(30, 41), [7]):
                rows.step({0: list(chunk)})
            return rows.logits(0)

        expected = logits("float32")
        # A few times what rounding does to one value.
        names = ("fp8_e4m3fn", "int8") if backend == "triton" else KV_DTYPES
        for name in names:
            dtype = KV_DTYPES[name]
            error = (logits(name) - expected).abs().max() / expected.abs().max()
            # int8: of a head's largest, twice the others' size.
            step = 2 / 127 if dtype == torch.int8 else torch.finfo(dtype).eps
            # Interpreted float8 is a step off now and then.
            assert error <= (4 if backend == "triton" else 3) * step, name
            assert name == "float32" or error > 0
    finally:
        ops.use(before)


def test_blocks_take_memory_once_written_or_when_told_to() -> None:
    before = psutil.Process().memory_info().rss
    cache = KVCache(KVCacheLayout(4, 16, 2, 64, torch.bfloat16), 8000)
    assert cache.num_bytes > 250e6
    assert psutil.Process().memory_info().rss - before < cache.num_bytes / 10
    assert not cache.data[1, 0, 77].any() and cache.data.dtype == torch.bfloat16
    cache.copy_blocks(torch.tensor([7]), torch.tensor([9]))
    assert cache.take_memory(0.0, 2)  # something is left
    assert psutil.Process().memory_info().rss - before < cache.num_bytes / 10
    assert not cache.take_memory(60.0, 2)
    if take_pages(cache.data.data_ptr(), 1):  # the system knows how
        assert psutil.Process().memory_info().rss - before > cache.num_bytes * 0.9
    assert not cache.data[1, 0, 77].any()
    narrow = KVCache(KVCacheLayout(2, 4, 2, 8, torch.float8_e4m3fn), 5)
    narrow.layers[1][0][2] = 1.5
    narrow.copy_blocks(torch.tensor([2, 4]), torch.tensor([4, 2]))
    assert (narrow.data[1, 0, 4].float() == 1.5).all() and not narrow.data[:, :, 2].float().any()


def test_memory_is_taken_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[int, float, int]] = []
    monkeypatch.setattr(
        KVCache,
        "take_memory",
        lambda cache, seconds, threads: taken.append((cache.num_blocks, seconds, threads)),
    )
    runner = make_runner()
    expected = (BLOCKS, model_runner.TAKE_MEMORY_SECONDS, runner.config.num_threads)
    assert taken == [expected]


def test_a_runner_that_rests_takes_memory_until_it_has_all() -> None:
    before = psutil.Process().memory_info().rss
    runner = make_runner()
    cache = runner._kv_cache = KVCache(KVCacheLayout(4, 16, 2, 64, torch.bfloat16), 8000)
    if not take_pages(cache.data.data_ptr(), 1):
        pytest.skip("the system does not know how")
    calls = 1
    while runner.rest():
        calls += 1
    assert calls > 1  # none of them took long
    assert psutil.Process().memory_info().rss - before > cache.num_bytes * 0.9
    runner.release()
    assert not runner.rest()


def test_a_copied_block_has_its_scales() -> None:
    layout = KVCacheLayout(2, 4, 3, 8, torch.int8)
    cache = KVCache(layout, 5)
    assert layout.bytes_per_block == 2 * 2 * 4 * 3 * (8 + 4)
    assert cache.num_bytes == sum(tensor.nbytes for tensor in cache.tensors)
    for layer in cache.layers:
        for kept in layer:
            kept.store(1 + torch.rand(4, 3, 8), torch.arange(8, 12))  # block 2
    written = [[kept[:][2] for kept in layer] for layer in cache.layers]
    cache.copy_blocks(torch.tensor([2, 4]), torch.tensor([4, 2]))
    for layer, before in zip(cache.layers, written, strict=True):
        for kept, block in zip(layer, before, strict=True):
            assert block.all() and torch.equal(kept[:][4], block)
            assert not kept[:][2].any()
