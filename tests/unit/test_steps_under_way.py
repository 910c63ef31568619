"""Steps begun before the one before is known, on a device that is not there."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headgate.proto.messages import Fork, NewRow, RowEnd, RowSampling, StepPlan, StepResult
from headgate.shard.config import ShardIdentity
from headgate.shard.distributed import Group, single_group
from headgate.shard.last_tokens import LastTokens, codes
from headgate.shard.model_runner import ModelRunner
from headgate.shard.models.registry import load_model
from headgate.shard.pending_step import PendingStep
from headgate.shard.staging import Staging
from tests.unit.fake_device import FakeDevice, Waits, Watch
from tests.unit.fake_model import FakeModel, greedy, shard_config
from tests.unit.test_model_runner import ThreadGroup

PROMPT = [3, 14, 15, 92, 65, 35]
BLOCKS = 60


@pytest.fixture(autouse=True)
def triton_kernels(unwatched_triton: None) -> None:
    """All tests here."""


def runner_on(
    device: FakeDevice | None, model: Any = None, group: Group | None = None, **config: Any
) -> ModelRunner:
    """With `device` None, one that waits for each step. Graphs want kernels that skip padding."""
    group = group or single_group()
    config = {"cuda_graphs": "0", **config}
    identity = ShardIdentity(group.rank, group.world_size, epoch=1)
    model = model or FakeModel(group)
    runner = ModelRunner(model, group, shard_config(**config), identity, device)
    if device is not None:
        runner.record()
    runner.allocate(BLOCKS)
    return runner


def row(row_id: int, prompt: list[int] = PROMPT, **sampling: Any) -> NewRow:
    blocks = range(6 * row_id, 6 * row_id + 6)
    return NewRow(
        row_id, prompt, RowSampling(**{"max_new_tokens": 9, **sampling}), block_ids=blocks
    )


KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 5, "top_p": 0.9},
    {"temperature": 0.8, "seed": 6, "repetition_penalty": 1.4, "presence_penalty": 0.5},
    {"logprobs": True, "top_n_tokens": 2},
    {"max_new_tokens": 3},
    {"stop_token_ids": (greedy(PROMPT, 4)[3],)},
    {"temperature": 1.0, "seed": 9, "logprobs": True, "min_new_tokens": 4},
]


def plans(steps: int) -> list[StepPlan]:
    """All kinds of rows begin together, one later; each plan has all rows, ended or not."""
    kinds = range(len(KINDS))
    found = [
        StepPlan(1, 1, new_rows=[row(k, **KINDS[k]) for k in kinds], rows=kinds, counts=[6] * 7)
    ]
    found.append(StepPlan(1, 2, new_rows=[row(7)], rows=[*kinds, 7], counts=[1] * 7 + [4]))
    found.append(StepPlan(1, 3, rows=[7, *kinds], counts=[2] + [1] * 7))
    for sequence in range(4, steps + 1):
        rows = [k for k in range(8) if k != 2 or sequence != 6]  # one skips a step
        found.append(StepPlan(1, sequence, rows=rows, counts=[1] * len(rows)))
    return found


def by_row(results: list[StepResult]) -> dict[int, list[Any]]:
    told: dict[int, list[Any]] = {}
    for result in results:
        assert not result.refused
        for place, row_id in enumerate(result.rows):
            top = result.top[place] if result.top else None
            chosen = result.token_ids[place], result.ends[place]
            value = round(result.logprobs[place], 4)
            ids = list(top.ids) if top is not None else []
            told.setdefault(row_id, []).append((*chosen, value, ids))
    return told


def one_ahead(runner: ModelRunner, all_plans: list[StepPlan]) -> list[StepResult]:
    """As the router plans: the next step is begun before a result is looked at."""
    results: list[StepResult] = []
    before: PendingStep | None = None
    for plan in all_plans:
        step = runner.begin(plan)
        if before is not None:
            results.append(before.result())
        before = step
    assert before is not None
    return [*results, before.result()]


def test_rows_of_all_kinds_get_what_they_get_step_by_step() -> None:
    waiting = runner_on(None)
    wanted = by_row([waiting.step(plan) for plan in plans(7)])
    device = FakeDevice()
    got = by_row(one_ahead(runner_on(device), plans(7)))
    assert got == wanted
    assert [end for _, end, *_ in got[5]][-1] is RowEnd.STOP_TOKEN
    assert len(got[4]) == 3 and len(got[5]) == 4


def test_a_step_is_begun_before_the_one_before_is_known() -> None:
    device = FakeDevice()
    runner = runner_on(device)
    first, second, third, *_ = plans(5)
    steps = [runner.begin(first), runner.begin(second)]
    assert device.waits == 0 and not steps[0].is_done and runner.heartbeat.busy
    steps.append(runner.begin(third))  # only now the first must be known
    assert device.waits == 1 and steps[0].is_done and not steps[1].is_done
    assert steps[2].result().rows and steps[1].is_done
    assert not runner.heartbeat.busy


def test_a_row_that_ended_has_no_token_in_the_step_begun_since() -> None:
    stop = greedy(PROMPT, 1)[0]
    runner = runner_on(FakeDevice())
    first = runner.begin(
        StepPlan(
            1, 1, new_rows=[row(1, stop_token_ids=(stop,)), row(2)], rows=[1, 2], counts=[6, 6]
        )
    )
    second = runner.begin(StepPlan(1, 2, rows=[1, 2], counts=[1, 1]))
    assert first.result().ends == [RowEnd.STOP_TOKEN, RowEnd.NONE]
    # Its place goes to another row before the second step is settled.
    third = runner.begin(StepPlan(1, 3, removed=[1], new_rows=[row(3)], rows=[3, 2], counts=[6, 1]))
    assert second.result().rows == [2]
    assert third.result().token_ids == [greedy(PROMPT, 1)[0], greedy(PROMPT, 3)[2]]


@pytest.mark.parametrize("kind", ["watermark", "fork", "reset"])
def test_what_must_wait_waits(kind: str) -> None:
    device = FakeDevice()
    runner = runner_on(device)
    sampling = {"watermark_gamma": 0.5, "watermark_delta": 2.0} if kind == "watermark" else {}
    runner.begin(StepPlan(1, 1, new_rows=[row(1, **sampling)], rows=[1], counts=[6]))
    waits = device.waits
    plan = StepPlan(1, 2, rows=[1], counts=[1])
    if kind == "fork":
        plan = StepPlan(1, 2, forks=[Fork(1, 2, 1, [6, 7], 6)], rows=[2], counts=[1])
    elif kind == "reset":
        plan = StepPlan(1, 2, reset=True, new_rows=[row(2)], rows=[2], counts=[6])
    step = runner.begin(plan)
    assert device.waits == waits + (kind != "watermark")  # whose first step waited already
    assert step.result().rows == [1 if kind == "watermark" else 2]


def test_a_reset_drops_what_is_under_way() -> None:
    device = FakeDevice()
    runner = runner_on(device)
    step = runner.begin(plans(1)[0])
    runner.reset()
    assert step.is_done and not step.result().rows and not runner.heartbeat.busy
    assert runner.step(plans(1)[0]).token_ids[0] == greedy(PROMPT, 1)[0]


def test_ranks_get_each_other_s_tokens_on_the_device() -> None:
    barrier, board = threading.Barrier(2), [None, None]
    runners = [runner_on(FakeDevice(), group=ThreadGroup(rank, barrier, board)) for rank in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(one_ahead, runner, plans(4)) for runner in runners]
        first, second = [job.result(60) for job in jobs]
    assert by_row(first) == by_row(one_ahead(runner_on(FakeDevice()), plans(4)))
    assert not by_row(second)
    held = [runner._batch.token_ids for runner in runners]  # type: ignore[union-attr]
    assert np.array_equal(*held)


def test_a_decode_step_waits_for_nothing_and_allocates_what_the_one_before_did(
    tiny_llama: Path,
) -> None:
    model = load_model(tiny_llama, dtype="float32", device="cpu", group=single_group())
    device = FakeDevice()
    runner = runner_on(device, model, cuda_graphs="", max_batch_prefill_tokens=64)
    rows = [row(k, list(b"abcdef"), **{**KINDS[k], "stop_token_ids": ()}) for k in (0, 1, 3)]
    ids = [new.id for new in rows]
    runner.step(StepPlan(1, 1, new_rows=rows, rows=ids, counts=[6] * 3))
    allocated = []
    step = None
    for sequence in range(2, 6):
        plan = StepPlan(1, sequence, rows=ids, counts=[1] * 3)
        if step is not None:
            step.wait()
        device.calls.clear()
        waits = device.waits
        with Watch() as watch, Waits() as found:
            step = runner.begin(plan)
        assert device.waits - waits <= 1  # for the step before last, which has ended
        assert found.found == []
        allocated.append(watch.allocated)
        assert "zeros" not in device.calls and "pinned" not in device.calls
        if sequence > 2:
            assert device.calls.count("replay") == 1
    assert allocated[1] == allocated[2] == allocated[3]


# ------------------------------------------------------------------ parts


def test_staging_keeps_a_step_s_arrays_until_the_next_but_one() -> None:
    device = FakeDevice()
    staging = Staging(device, 64)
    staging.begin()
    arrays = [np.arange(3), np.array([[1.5], [2.5]], np.float32), np.zeros(0, np.int32)]
    tensors = staging.upload(arrays)
    for array, tensor in zip(arrays, tensors, strict=True):
        assert np.array_equal(tensor.numpy(), array)
    fetch = staging.download([tensors[0] + 1])
    staging.begin()
    (large,) = staging.upload([np.arange(1000)])  # beyond what there was
    assert large.sum() == 499500
    assert fetch()[0].tolist() == [1, 2, 3]
    calls = len(device.calls)
    for _ in range(4):
        staging.begin()
        staging.upload([np.arange(900)])
    assert device.calls[calls:].count("pinned") <= 1


def test_codes_stand_for_the_last_tokens() -> None:
    last = LastTokens(FakeDevice(), 8)
    last.keep(torch.tensor([50, -1, 52]))
    ids = torch.tensor([7, *codes(3).tolist(), 0])
    assert last.resolve(ids).tolist() == [7, 50, 0, 52, 0]
    assert last.resolve(ids.int()).dtype == torch.int32
