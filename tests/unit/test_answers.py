"""Several answers to one prompt through the router: n, best_of, their life as one request."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from headgate.proto import router_pb2
from headgate.proto.messages import RowSampling
from headgate.router import errors
from headgate.router.beam_search import BeamParams, EarlyStopping
from tests.unit.fake_shard import expected_answer, expected_beams, expected_prompt_logprobs
from tests.unit.fake_shard_server import EOS, Behaviour, RunningRouter, running_router, until
from tests.unit.stream_gateway import Gateway
from tests.unit.test_engine import request

SAMPLED = {"do_sample": True, "seed": 11}


def expected(router: RunningRouter, message: router_pb2.GenerateRequest) -> list[list[int]]:
    """Each answer as it would be if it were the only one."""
    given = message.parameters
    sampling = RowSampling(
        max_new_tokens=given.max_new_tokens,
        seed=given.seed if given.do_sample else 0,
        ignore_eos=given.ignore_eos,
    )
    return [
        expected_answer(
            list(message.token_ids.ids),
            replace(sampling, sample_index=index),
            vocabulary=router.behaviour.vocabulary,
            eos_id=EOS,
        )[0]
        for index in range(max(given.n, given.best_of))
    ]


def answers_of(response: router_pb2.GenerateResponse) -> list[list[int]]:
    return [[token.id for token in answer.tokens] for answer in (response, *response.others)]


async def test_each_answer_is_the_one_of_its_sample_index(tmp_path: Path) -> None:
    async with running_router(tmp_path) as router:
        messages = [
            request(list(range(length)), max_new_tokens=12, n=n, ignore_eos=False, **SAMPLED)
            for length, n in ((1, 3), (9, 4), (40, 2), (5, 1))
        ]
        responses = await asyncio.gather(*(router.stub.Generate(m) for m in messages))
        for message, response in zip(messages, responses, strict=True):
            assert answers_of(response) == expected(router, message)
            ends = [answer.finished for answer in (response, *response.others)]
            assert [end.index for end in ends] == list(range(message.parameters.n))
            assert {end.input_tokens for end in ends} == {len(message.token_ids.ids)}
            assert {end.seed for end in ends} == {11}
            assert response.accepted.num_answers == message.parameters.n
        router.assert_idle()
        assert router.metric("tgi_request_success") == len(messages)
        assert router.metric("tgi_prompt_tokens") == 55


async def test_streamed_answers_come_interleaved(tmp_path: Path) -> None:
    async with running_router(tmp_path) as router:
        message = request([1, 2, 3], max_new_tokens=6, n=3, **SAMPLED)
        events = [event async for event in router.stub.GenerateStream(message)]
        tokens: list[list[int]] = [[], [], []]
        for event in events:
            for token in event.tokens.tokens:
                assert event.tokens.first_index == len(tokens[event.tokens.index])
                tokens[event.tokens.index].append(token.id)
        assert tokens == expected(router, message)
        indices = [e.tokens.index for e in events if e.WhichOneof("event") == "tokens"]
        assert indices != sorted(indices)


@pytest.mark.parametrize(("best_of", "n"), [(4, 1), (4, 3), (2, 2)])
async def test_best_of_gives_the_best_by_mean_logprob(tmp_path: Path, best_of: int, n: int) -> None:
    async with running_router(tmp_path, max_best_of=4) as router:
        message = request(
            [1, 2, 3], max_new_tokens=9, n=n, best_of=best_of, ignore_eos=False, **SAMPLED
        )
        response = await router.stub.Generate(message)
        # The fake shard's logprob of a token is -id / 4.
        ranked = sorted(expected(router, message), key=lambda ids: sum(ids) / len(ids))
        assert answers_of(response) == ranked[:n]
        ends = [answer.finished for answer in (response, *response.others)]
        assert [end.index for end in ends] == list(range(n))
        for ids, end in zip(ranked, ends, strict=False):
            assert end.generated_tokens == len(ids)
        router.assert_idle()


async def test_the_best_answer_brings_the_prompts_logprobs(tmp_path: Path) -> None:
    async with running_router(tmp_path, max_best_of=4) as router:
        message = request(
            [1, 2, 3], max_new_tokens=9, n=2, best_of=4, prompt_logprobs=True, **SAMPLED
        )
        response = await router.stub.Generate(message)
        assert [token.id for token in response.finished.prefill] == [1, 2, 3]
        assert not response.others[0].finished.prefill


async def test_answers_count_one_by_one_against_the_limit(tmp_path: Path) -> None:
    behaviour = Behaviour(step_seconds=0.01)
    async with running_router(tmp_path, behaviour=behaviour, max_concurrent_requests=4) as router:
        message = request([1], max_new_tokens=100, n=3)
        running = asyncio.ensure_future(_generate(router, message))
        await until(lambda: router.metric("tgi_request_live") == 3)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await router.stub.Generate(request([1], max_new_tokens=1, n=2))
        assert isinstance(errors.from_rpc_error(caught.value), errors.OverloadedError)
        await router.stub.Generate(request([1], max_new_tokens=1))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await router.stub.Generate(request([1], max_new_tokens=1, n=5))
        assert errors.from_rpc_error(caught.value).message == (
            "Input validation error: `n` must be > 0 and <= 4. Given: 5"
        )
        running.cancel()
        await until(lambda: router.metric("tgi_request_live") == 0)
        router.assert_idle()


async def _generate(
    router: RunningRouter, message: router_pb2.GenerateRequest
) -> router_pb2.GenerateResponse:
    return await router.stub.Generate(message)


async def test_a_lost_group_loses_no_answer(tmp_path: Path) -> None:
    behaviour = Behaviour(step_seconds=0.01)
    async with running_router(tmp_path, behaviour=behaviour) as router:
        message = request(list(range(9)), max_new_tokens=40, n=4, **SAMPLED)
        running = asyncio.ensure_future(_generate(router, message))
        await until(lambda: router.metric("tgi_generated_tokens") > 30)
        await router.launcher.restart_group()
        assert answers_of(await running) == expected(router, message)
        assert router.metric("tgi_request_recoveries") == 4
        router.assert_idle()


async def test_little_memory_for_many_answers(tmp_path: Path) -> None:
    behaviour = Behaviour(num_blocks=40)
    async with running_router(tmp_path, behaviour=behaviour, kv_overcommit=1.0) as router:
        message = request(list(range(20)), max_new_tokens=40, n=8, **SAMPLED)
        response = await router.stub.Generate(message)
        assert answers_of(response) == expected(router, message)
        assert router.metric("tgi_request_preemptions") > 0
        router.assert_idle()


def by_answer(gateway: Gateway, attempt: int, n: int) -> list[list[router_pb2.Token]]:
    tokens: list[list[router_pb2.Token]] = [[] for _ in range(n)]
    for event in gateway.of(1, attempt):
        tokens[event.tokens.index].extend(event.tokens.tokens)
    return tokens


def ends(gateway: Gateway, attempt: int) -> list[router_pb2.Finished]:
    return [e.finished for e in gateway.of(1, attempt) if e.WhichOneof("event") == "finished"]


async def test_answers_go_on_at_a_new_router(tmp_path: Path) -> None:
    """Answer 0 was sent in part, 1 to its end, 2 but for its end, 3 not at all."""
    async with running_router(tmp_path) as router:
        gateway = Gateway(router)
        message = request([1, 2, 3], max_new_tokens=12, n=4, **SAMPLED)
        gateway.submit(1, message)
        await until(lambda: len(ends(gateway, 1)) == 4)
        first = by_answer(gateway, 1, 4)
        texts = {end.index: end.generated_text for end in ends(gateway, 1)}

        def progress(index: int, count: int, **fields: Any) -> router_pb2.DeliveredAnswer:
            return router_pb2.DeliveredAnswer(index=index, tokens=first[index][:count], **fields)

        answers = [progress(0, 5), progress(1, 12, finished=True), progress(2, 12)]
        delivered = router_pb2.Delivered(seed=11, answers=answers)
        gateway.submit(1, message, attempt=2, delivered=delivered)
        await until(lambda: len(ends(gateway, 2)) == 3)
        accepted = gateway.of(1, 2)[0].accepted
        assert accepted.num_answers == 3
        again = by_answer(gateway, 2, 4)
        assert [token.id for token in again[0]] == [token.id for token in first[0][5:]]
        assert not again[1] and not again[2]
        assert [token.id for token in again[3]] == [token.id for token in first[3]]
        assert {end.index: end.generated_text for end in ends(gateway, 2)} == {
            index: texts[index] for index in (0, 2, 3)
        }
        router.assert_idle()
        await gateway.leave()


async def test_a_gateways_cancel_ends_all_answers(tmp_path: Path) -> None:
    behaviour = Behaviour(step_seconds=0.01)
    async with running_router(tmp_path, behaviour=behaviour) as router:
        gateway = Gateway(router)
        gateway.submit(1, request([1, 2], max_new_tokens=100, n=3))
        await until(lambda: len(gateway.tokens(1)) > 6)
        gateway.say(cancel=1)
        await until(lambda: router.metric("tgi_request_live") == 0)
        router.assert_idle()
        assert router.metric('tgi_request_failure{err="dropped"}') == 1
        await gateway.leave()


async def test_a_stop_text_ends_only_its_own_answer(tmp_path: Path) -> None:
    async with running_router(tmp_path) as router:
        message = request([1, 2, 3], max_new_tokens=12, n=3, **SAMPLED)
        free = await router.stub.Generate(message)
        message.parameters.stop.append(free.others[0].tokens[4].text)
        stopped = await router.stub.Generate(message)
        full = answers_of(free)
        for ids, answer in zip(answers_of(stopped), full, strict=True):
            assert ids == answer[: len(ids)]
        reasons = [answer.finished.reason for answer in (stopped, *stopped.others)]
        assert reasons[1] == router_pb2.FINISH_REASON_STOP_SEQUENCE
        assert len(answers_of(stopped)[1]) <= 5
        router.assert_idle()


async def test_a_prompt_is_scored_without_an_answer(tmp_path: Path) -> None:
    async with running_router(tmp_path) as router:
        prompt = list(range(1, 12))
        message = request(prompt, max_new_tokens=0, prompt_logprobs=True, n=2)
        response = await router.stub.Generate(message)
        for answer in (response, *response.others):
            assert not answer.tokens
            assert (answer.finished.generated_tokens, answer.finished.generated_text) == (0, "")
            assert answer.finished.reason == router_pb2.FINISH_REASON_LENGTH
        assert [token.id for token in response.finished.prefill] == prompt
        logprobs = [token.logprob for token in response.finished.prefill[1:]]
        assert logprobs == expected_prompt_logprobs(prompt)
        best = await router.stub.Generate(
            request(prompt, max_new_tokens=0, prompt_logprobs=True, best_of=2, **SAMPLED)
        )
        assert [token.id for token in best.finished.prefill] == prompt
        router.assert_idle()
        assert router.metric("tgi_generated_tokens") == 0
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await router.stub.Generate(request(prompt, max_new_tokens=0))
        assert "`max_new_tokens` must be strictly positive" in str(caught.value.details())


# ------------------------------------------------------------------ beams


async def test_beams_are_those_of_a_search_alone(tmp_path: Path) -> None:
    async with running_router(tmp_path, num_shards=2) as router:
        cases = [
            (list(range(9)), 4, 2, {"length_penalty": 2.0}),
            ([5], 3, 3, {"early_stopping": router_pb2.EARLY_STOPPING_NEVER}),
            ([7, 8, 9], 2, 1, {"min_new_tokens": 5, "ignore_eos": True}),
        ]
        messages = [
            request(prompt, max_new_tokens=9, beam_width=width, n=n, ignore_eos=False)
            for prompt, width, n, _ in cases
        ]
        for message, (_, _, _, fields) in zip(messages, cases, strict=True):
            message.parameters.MergeFrom(router_pb2.Parameters(**fields))
        responses = await asyncio.gather(*(router.stub.Generate(m) for m in messages))
        for (prompt, width, n, fields), response in zip(cases, responses, strict=True):
            params = BeamParams(
                width=width,
                max_new_tokens=9,
                min_new_tokens=fields.get("min_new_tokens", 0),
                length_penalty=fields.get("length_penalty", 1.0),
                early_stopping=EarlyStopping(fields.get("early_stopping", 0)),
                eos_ids=frozenset() if "ignore_eos" in fields else frozenset({EOS}),
            )
            found = expected_beams(prompt, params, vocabulary=router.behaviour.vocabulary)
            assert answers_of(response) == [list(one.token_ids) for one in found[:n]]
            ends = [answer.finished for answer in (response, *response.others)]
            assert [end.score for end in ends] == pytest.approx([one.score for one in found[:n]])
            assert response.tokens[0].logprob == pytest.approx(found[0].logprobs[0])
        router.assert_idle()


async def test_beams_through_a_lost_group_and_a_cancel(tmp_path: Path) -> None:
    behaviour = Behaviour(step_seconds=0.01)
    async with running_router(tmp_path, behaviour=behaviour) as router:
        message = request([1, 2, 3], max_new_tokens=30, beam_width=4)
        running = asyncio.ensure_future(_generate(router, message))
        await until(lambda: router.metric("tgi_batch_current_size") == 4)
        await router.launcher.restart_group()
        params = BeamParams(width=4, max_new_tokens=30)
        found = expected_beams([1, 2, 3], params, vocabulary=router.behaviour.vocabulary)
        assert answers_of(await running) == [list(found[0].token_ids)]
        cancelled = asyncio.ensure_future(_generate(router, message))
        await until(lambda: router.metric("tgi_batch_current_size") == 4)
        cancelled.cancel()
        await until(lambda: router.metric("tgi_request_live") == 0)
        router.assert_idle()
