"""The null shard: real plans of a real scheduler, answered with the prompt over and over."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from headgate.proto.messages import RowSampling
from headgate.router.beam_rows import BeamGroup
from headgate.router.beam_search import BeamParams, BeamSearch
from headgate.router.request import Request
from headgate.router.scheduler import Scheduler
from headgate.router.scheduler_config import SchedulerConfig
from headgate.shard.config import ShardIdentity
from headgate.shard.input_batch import PlanError
from headgate.shard.null_runner import NullRunner
from tests.unit.fake_model import shard_config

EOS = 9


def runner(rank: int = 0) -> NullRunner:
    model = SimpleNamespace(
        model_type="null", vocab_size=100, max_position_embeddings=64, eos_token_ids=(EOS,)
    )
    return NullRunner(model, shard_config(), ShardIdentity(rank, 2, 1))  # type: ignore[arg-type]


def serve(requests: list[Request], num_blocks: int = 100) -> None:
    """Plans ahead by one step, as the engine does, until all requests have ended."""
    scheduler = Scheduler(SchedulerConfig(num_blocks, 4, 16, kv_overcommit=1.0))
    shard, sequence = runner(), 0
    for request in requests:
        scheduler.add(request)
    ahead = []
    while scheduler.has_work():
        sequence += 1
        plan = scheduler.schedule(1, sequence)
        if plan is not None:
            ahead.append(plan)
        if plan is None or len(ahead) == 2:
            scheduler.update(shard.step(ahead.pop(0)))
    scheduler.check_integrity()


def request(id_: int, prompt: list[int], **sampling: object) -> Request:
    return Request(id_, prompt, RowSampling(**sampling))  # type: ignore[arg-type]


def test_answers_repeat_the_prompt_up_to_their_length() -> None:
    asked = [
        request(1, [3, 4, 5], max_new_tokens=7),
        request(2, list(range(20, 50)), max_new_tokens=2),  # a prompt of two chunks
        request(3, [6, EOS, 7], max_new_tokens=3),
        request(4, [3, 4, 5], max_new_tokens=7, stop_token_ids=(5,)),
    ]
    serve(asked)
    assert [entry.output_ids for entry in asked] == [
        [3, 4, 5, 3, 4, 5, 3],
        [20, 21],
        [6, 7, 6],
        [3, 4, 5],
    ]
    assert [entry.finish_reason for entry in asked] == ["length"] * 3 + ["stop_token"]


def test_a_preempted_answer_goes_on_where_it_was() -> None:
    asked = [request(id_, [id_, 4, 5], max_new_tokens=30) for id_ in (1, 2, 3)]
    serve(asked, num_blocks=12)
    assert any(entry.preemptions for entry in asked)
    assert [entry.output_ids for entry in asked] == [[id_, 4, 5] * 10 for id_ in (1, 2, 3)]


def test_forks_go_on_from_what_they_share() -> None:
    leader = request(1, [3, 4, 5], max_new_tokens=7)
    children = [
        Request(id_, [3, 4, 5], RowSampling(7, sample_index=id_), leader=leader) for id_ in (2, 3)
    ]
    serve([leader, *children])
    assert [entry.output_ids for entry in children] == [[3, 4, 5, 3, 4, 5, 3]] * 2


def test_beams_have_something_to_choose_from() -> None:
    params = BeamParams(width=2, max_new_tokens=5)
    rows = [request(id_, [3, 4], max_new_tokens=5, top_n_tokens=4) for id_ in (1, 2)]
    group = BeamGroup.of(BeamSearch(params), rows)
    serve(rows[:1])
    assert [len(one.token_ids) for one in group.search.finished] == [5, 5]


def test_only_rank_0_has_tokens_and_what_cannot_be_decoded_ends_the_shard() -> None:
    scheduler = Scheduler(SchedulerConfig(10, 4, max_batch_prefill_tokens=16))
    scheduler.add(request(1, [3, 4], max_new_tokens=2))
    plan = scheduler.schedule(1, 1)
    assert plan is not None
    assert list(runner(rank=1).step(plan).rows) == []
    assert list(runner(rank=0).step(plan).rows) == [1]
    with pytest.raises(PlanError, match="unreadable"):
        runner().step(plan, problem="unreadable")
