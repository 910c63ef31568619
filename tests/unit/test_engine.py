"""Engine and shard client against fake shards behind real gRPC: steps, loss, refusals, draining."""

from __future__ import annotations

import asyncio
import math
import random
from pathlib import Path
from typing import Any

import grpc
import pytest

from headgate.proto import router_pb2
from headgate.proto.messages import Pooling, RowEnd, RowSampling
from headgate.router import engine, errors, output_processor
from headgate.router.group_keeper import NotEnoughMemory
from tests.checkpoints import write_tokenizer
from tests.unit.fake_shard import expected_answer, expected_pooled, expected_prompt_logprobs
from tests.unit.fake_shard_server import EOS, Behaviour, RunningRouter, running_router, until
from tests.unit.stream_events import all_events


def request(prompt: list[int], **parameters: Any) -> router_pb2.GenerateRequest:
    return router_pb2.GenerateRequest(
        token_ids=router_pb2.TokenIds(ids=prompt),
        parameters=router_pb2.Parameters(**{"ignore_eos": True, **parameters}),
    )


def answer_of(
    router: RunningRouter, message: router_pb2.GenerateRequest, seed: int = 0
) -> tuple[list[int], RowEnd]:
    given = message.parameters
    sampling = RowSampling(
        max_new_tokens=given.max_new_tokens,
        seed=seed,
        ignore_eos=given.ignore_eos,
        stop_token_ids=tuple(given.stop_token_ids),
        min_new_tokens=given.min_new_tokens,
    )
    return expected_answer(
        list(message.token_ids.ids),
        sampling,
        vocabulary=router.behaviour.vocabulary,
        eos_id=EOS,
    )


def ids_of(response: router_pb2.GenerateResponse) -> list[int]:
    return [token.id for token in response.tokens]


def prompts(count: int, seed: int = 1) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(250) for _ in range(rng.randrange(1, 60))] for _ in range(count)]


@pytest.mark.parametrize("drafts", [0, 3])
async def test_many_at_once_get_the_answers_they_would_get_alone(
    tmp_path: Path, drafts: int
) -> None:
    async with running_router(
        tmp_path, num_shards=3, speculate=drafts, max_batch_prefill_tokens=400
    ) as router:
        rng = random.Random(2)
        messages = [
            request(prompt, max_new_tokens=rng.randrange(1, 40), ignore_eos=rng.random() < 0.5)
            for prompt in prompts(40)
        ]
        responses = await asyncio.gather(*(router.stub.Generate(m) for m in messages))
        for message, response in zip(messages, responses, strict=True):
            ids, end = answer_of(router, message)
            assert ids_of(response) == ids
            reason = {RowEnd.EOS: router_pb2.FINISH_REASON_EOS_TOKEN}.get(
                end, router_pb2.FINISH_REASON_LENGTH
            )
            assert response.finished.reason == reason
            assert response.finished.generated_tokens == len(ids)
            assert response.finished.input_tokens == len(message.token_ids.ids)
        router.assert_idle()
        assert router.metric("tgi_request_success") == 40
        assert router.metric("tgi_generated_tokens") == sum(len(r.tokens) for r in responses)
        assert router.metric('tgi_batch_inference_success{method="prefill"}') > 0
        assert router.metric('tgi_batch_inference_success{method="decode"}') > 0
        together = router.metric("tgi_accepted_draft_tokens")
        assert together == router.metric("tgi_request_skipped_tokens_sum")
        assert (together > 20) == (router.metric("tgi_draft_tokens") > together) == bool(drafts)


async def test_tokens_after_a_stop_text_are_dropped(tmp_path: Path) -> None:
    async with running_router(tmp_path, speculate=8, max_batch_prefill_tokens=400) as router:
        for prompt in prompts(12):
            whole = await router.stub.Generate(request(prompt, max_new_tokens=30))
            assert ids_of(whole) == answer_of(router, request(prompt, max_new_tokens=30))[0]
            texts = [token.text for token in whole.tokens]
            stop = next(text for text in texts[5:] if text.isascii() and text)
            found = await router.stub.Generate(request(prompt, max_new_tokens=30, stop=[stop]))
            count = texts.index(stop) + 1
            assert ids_of(found) == ids_of(whole)[:count]
            assert found.finished.generated_tokens == count
        router.assert_idle()


async def test_who_asks_after_a_step_began_comes_into_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_router(tmp_path, behaviour=Behaviour(step_seconds=0.04)) as router:
        steps: dict[float, float] = {}
        for patience in (0.0, 0.8):
            monkeypatch.setattr(engine, "PATIENCE", patience)
            tokens = router.stub.GenerateStream(request([1, 2], max_new_tokens=60))
            waits: list[int] = []
            asked: asyncio.Task[object] | None = None
            async for event in tokens:
                if asked is None or asked.done():
                    message = request([3, 4, len(waits)], max_new_tokens=1)
                    asked = asyncio.ensure_future(router.stub.Generate(message))
                    waits.append(0)
                waits[-1] += len(event.tokens.tokens)
            assert asked is not None
            await asked
            steps[patience] = sum(waits[10:-1]) / len(waits[10:-1])
        assert steps[0.8] < steps[0.0]


async def test_short_steps_are_planned_a_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_router(tmp_path, behaviour=Behaviour(step_seconds=0.01)) as router:
        messages = router.launcher.group.servers[0].messages
        for name in ("AHEAD_SECONDS", "ALONE_AHEAD_SECONDS"):
            monkeypatch.setattr(engine.Engine, "_is_alone", name.startswith("ALONE"))
            for seconds, at_a_time in ((10.0, engine.MAX_AHEAD + 1), (0.008, 1)):
                monkeypatch.setattr(engine, name, seconds)
                del messages[:]
                asked = request([1, 2, 3], max_new_tokens=60)
                assert ids_of(await router.stub.Generate(asked)) == answer_of(router, asked)[0]
                assert sorted(messages)[len(messages) // 2] == at_a_time, messages
        router.assert_idle()


async def test_a_row_that_had_no_company_lately_is_planned_further_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "ALONE_AFTER", 60.0)
    monkeypatch.setattr(engine, "ALONE_AHEAD_SECONDS", 10.0)
    async with running_router(tmp_path, behaviour=Behaviour(step_seconds=0.01)) as router:
        messages = router.launcher.group.servers[0].messages
        usual: list[int] = []
        for number in range(2):
            del messages[:]
            await router.stub.Generate(request([1, 2, 3, number], max_new_tokens=40))
            usual.append(sorted(messages)[len(messages) // 2])
            two = [request([number, other], max_new_tokens=20) for other in range(2)]
            await asyncio.gather(*(router.stub.Generate(message) for message in two))
        assert usual == [engine.MAX_AHEAD + 1, 1]
        router.assert_idle()


async def test_little_memory_means_preemption_not_failure(tmp_path: Path) -> None:
    behaviour = Behaviour(num_blocks=40)
    async with running_router(tmp_path, behaviour=behaviour, kv_overcommit=0.95) as router:
        messages = [request(prompt, max_new_tokens=40) for prompt in prompts(20)]
        responses = await asyncio.gather(*(router.stub.Generate(m) for m in messages))
        for message, response in zip(messages, responses, strict=True):
            assert ids_of(response) == answer_of(router, message)[0]
        assert router.metric("tgi_request_preemptions") > 0
        router.assert_idle()


async def test_a_seeded_request_is_reproducible_and_its_seed_is_told(tmp_path: Path) -> None:
    async with running_router(tmp_path) as router:
        message = request([1, 2, 3], max_new_tokens=9, do_sample=True)
        drawn = await router.stub.Generate(message)
        message.parameters.seed = drawn.accepted.seed
        again = await router.stub.Generate(message)
        assert ids_of(drawn) == ids_of(again) == answer_of(router, message, again.accepted.seed)[0]
        assert again.finished.seed == drawn.finished.seed == drawn.accepted.seed


async def test_lost_group_is_a_pause_with_the_same_tokens(tmp_path: Path) -> None:
    behaviour = Behaviour(step_seconds=0.01)
    async with running_router(tmp_path, behaviour=behaviour) as router:
        messages = [request(prompt, max_new_tokens=40) for prompt in prompts(8)]
        running = asyncio.gather(*(router.stub.Generate(m) for m in messages))
        await until(lambda: router.metric("tgi_generated_tokens") > 30)
        await router.launcher.kill_group()
        await until(lambda: router.parts.status.state == router_pb2.SERVER_STATE_RECOVERING)
        late = asyncio.ensure_future(_generate(router, messages[0]))
        await asyncio.sleep(0.05)
        assert not running.done()
        await router.launcher.start_group()
        for message, response in zip(messages, await running, strict=True):
            assert ids_of(response) == answer_of(router, message)[0]
        assert ids_of(await late) == answer_of(router, messages[0])[0]
        assert router.metric("tgi_group_recoveries") == 1
        assert router.metric("tgi_request_recoveries") > 0
        assert [step["epoch"] for step in router.launcher.said("step")] == [1, 2]
        assert [ready["epoch"] for ready in router.launcher.said("ready")] == [1, 2]
        router.assert_idle()


async def _generate(
    router: RunningRouter, message: router_pb2.GenerateRequest
) -> router_pb2.GenerateResponse:
    return await router.stub.Generate(message)


def constrained(prompt: list[int], regex: str = "a+") -> router_pb2.GenerateRequest:
    return request(prompt, max_new_tokens=4, grammar=router_pb2.Grammar(regex=regex))


async def test_shards_get_a_grammar_before_its_row(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    async with running_router(tmp_path, behaviour=Behaviour(vocabulary=300)) as router:
        assert router.launcher.group is not None
        first, other = router.launcher.group.servers
        for regex in ("a+", "b+", "a+"):
            await router.stub.Generate(constrained([1, 2], regex))
        assert len(first.prepared) == 2 and other.prepared == []  # shard 0 alone, each once
        assert "a+" in first.prepared[0] and "b+" in first.prepared[1]
        await router.launcher.restart_group()
        await until(lambda: len(router.launcher.said("ready")) == 2)
        await router.stub.Generate(constrained([3]))
        assert router.launcher.group.servers[0].prepared == first.prepared[:1]
        with pytest.raises(grpc.aio.AioRpcError, match="unclosed"):
            await router.stub.Generate(constrained([1], "["))


async def test_a_row_that_fails_fails_its_request_alone(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    behaviour = Behaviour(vocabulary=300, fails_grammars=True)
    async with running_router(tmp_path, behaviour=behaviour) as router:
        healthy = request([5, 6], max_new_tokens=30)
        running = asyncio.ensure_future(_generate(router, healthy))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await router.stub.Generate(constrained([1, 2]))
        error = errors.from_rpc_error(caught.value)
        assert isinstance(error, errors.GenerationError) and "it leads nowhere" in error.message
        assert ids_of(await running) == answer_of(router, healthy)[0]
        router.assert_idle()


async def test_grammars_may_be_switched_off(tmp_path: Path) -> None:
    async with running_router(tmp_path, grammar_support=False) as router:
        with pytest.raises(grpc.aio.AioRpcError, match="grammar is not supported"):
            await router.stub.Generate(constrained([1]))


async def test_a_request_that_kills_groups_is_given_up(tmp_path: Path) -> None:
    behaviour = Behaviour(step_seconds=0.01)
    async with running_router(tmp_path, behaviour=behaviour) as router:
        poisonous = asyncio.ensure_future(_generate(router, request([1], max_new_tokens=150)))
        for recoveries in range(3):
            await until(lambda: router.metric("tgi_batch_current_size") == 1)
            assert router.metric("tgi_request_recoveries") == recoveries
            await router.launcher.restart_group()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await poisonous
        error = errors.from_rpc_error(caught.value)
        assert isinstance(error, errors.GenerationError)
        assert error.http_status == 424
        healthy = request([5, 6], max_new_tokens=3)
        assert ids_of(await router.stub.Generate(healthy)) == answer_of(router, healthy)[0]
        assert router.metric('tgi_request_failure{err="generation"}') == 1
        router.assert_idle()


@pytest.mark.parametrize("has_socket", [True, False])
async def test_a_broken_stream_is_reported_and_waited_out(tmp_path: Path, has_socket: bool) -> None:
    behaviour = Behaviour(step_seconds=0.01, has_socket=has_socket)
    async with running_router(tmp_path, behaviour=behaviour) as router:
        message = request([1, 2], max_new_tokens=50)
        running = asyncio.ensure_future(_generate(router, message))
        await until(lambda: router.metric("tgi_generated_tokens") > 3)
        await router.launcher.kill_group(tell=False)
        await until(lambda: bool(router.launcher.said("shard_failed")))
        assert router.launcher.said("shard_failed")[0]["epoch"] == 1
        assert router.parts.status.state == router_pb2.SERVER_STATE_RECOVERING
        await router.launcher.start_group()
        assert ids_of(await running) == answer_of(router, message)[0]


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ("hung", "no heartbeat for 0.3 s"),
        ("stalled", "no progress in a step for 0.3 s (shards 0, 1 alike)"),
    ],
)
async def test_a_hung_shard_is_reported(tmp_path: Path, trouble: str, reason: str) -> None:
    behaviour = Behaviour(step_seconds=0.01)
    async with running_router(tmp_path, behaviour=behaviour, heartbeat_timeout=0.3) as router:
        message = request([1, 2], max_new_tokens=100)
        running = asyncio.ensure_future(_generate(router, message))
        await until(lambda: router.metric("tgi_generated_tokens") > 3)
        if trouble == "stalled":
            behaviour.gate.clear()
        setattr(behaviour, trouble, True)
        await until(lambda: bool(router.launcher.said("shard_hung")))
        assert router.launcher.said("shard_hung")[0]["reason"] == reason
        setattr(behaviour, trouble, False)
        behaviour.gate.set()
        await router.launcher.restart_group()
        assert ids_of(await running) == answer_of(router, message)[0]


async def test_a_shard_that_hangs_while_the_group_starts_is_reported(tmp_path: Path) -> None:
    behaviour = Behaviour(hangs_in_warmup=True)
    async with running_router(
        tmp_path, behaviour=behaviour, ready=False, heartbeat_timeout=0.3
    ) as router:
        await router.launcher.start_group()
        await until(lambda: bool(router.launcher.said("shard_hung")))
        behaviour.hangs_in_warmup = behaviour.hung = False
        await router.launcher.restart_group()
        await until(lambda: bool(router.launcher.said("ready")))


async def test_a_fault_of_the_router_fails_what_runs_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_router(tmp_path) as router:

        def fault(*_: Any) -> None:
            raise AssertionError("the books do not balance")

        for method in ("schedule", "cancel", "reset"):
            monkeypatch.setattr(router.parts.engine._scheduler, method, fault, raising=False)
        message = request([1, 2], max_new_tokens=50)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(_generate(router, message), 10)
        assert isinstance(errors.from_rpc_error(caught.value), errors.InternalError)
        await until(lambda: bool(router.launcher.said("shard_failed")))
        await router.launcher.restart_group()
        assert ids_of(await router.stub.Generate(message)) == answer_of(router, message)[0]
        router.assert_idle()


async def test_a_fault_in_one_answer_is_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(*_: Any) -> None:
        raise ValueError("no such text")

    async with running_router(tmp_path, behaviour=Behaviour(step_seconds=0.01)) as router:
        message = request([1, 2], max_new_tokens=30)
        running = asyncio.ensure_future(_generate(router, message))
        await until(lambda: router.metric("tgi_generated_tokens") > 3)
        with monkeypatch.context() as broken:
            broken.setattr(output_processor.Answer, "prefill_tokens", fault)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await asyncio.wait_for(_generate(router, request([3], max_new_tokens=2)), 10)
        assert isinstance(errors.from_rpc_error(caught.value), errors.InternalError)
        assert ids_of(await running) == answer_of(router, message)[0]
        router.assert_idle()


async def test_a_fault_while_a_group_starts_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_router(tmp_path, ready=False) as router:
        with monkeypatch.context() as broken:
            broken.setattr(router.parts.engine, "attach", None)
            await router.launcher.start_group()
            await until(lambda: bool(router.launcher.said("shard_failed")))
        await router.launcher.restart_group()
        await until(lambda: bool(router.launcher.said("ready")))


async def test_refused_steps_are_made_smaller(tmp_path: Path) -> None:
    async with running_router(tmp_path, behaviour=Behaviour(refuse_above=10)) as router:
        messages = [request(prompt, max_new_tokens=20) for prompt in prompts(12)]
        responses = await asyncio.gather(*(router.stub.Generate(m) for m in messages))
        for message, response in zip(messages, responses, strict=True):
            assert ids_of(response) == answer_of(router, message)[0]
        assert router.metric('tgi_batch_inference_failure{method="prefill"}') > 0
        router.assert_idle()


async def test_a_group_that_refuses_everything_is_given_up(tmp_path: Path) -> None:
    async with running_router(tmp_path, behaviour=Behaviour(refuse=True)) as router:
        message = request([1, 2], max_new_tokens=5)
        running = asyncio.ensure_future(_generate(router, message))
        await until(lambda: bool(router.launcher.said("shard_failed")))
        assert "refused" in router.launcher.said("shard_failed")[0]["reason"]
        assert not router.launcher.said("step")
        router.behaviour.refuse = False
        await router.launcher.restart_group()
        assert ids_of(await running) == answer_of(router, message)[0]


async def test_a_refusal_of_any_rank_counts(tmp_path: Path) -> None:
    # Rank 0 runs the step all the same.
    async with running_router(tmp_path, behaviour=Behaviour(refuse_once={1})) as router:
        message = request([1, 2], max_new_tokens=5)
        response = asyncio.ensure_future(_generate(router, message))
        await until(lambda: router.metric('tgi_batch_inference_failure{method="prefill"}') > 0)
        assert ids_of(await response) == answer_of(router, message)[0]


async def test_prompt_logprobs_and_alternatives(tmp_path: Path) -> None:
    async with running_router(tmp_path) as router:
        prompt = prompts(1)[0] + [7] * 50
        message = request(prompt, max_new_tokens=3, prompt_logprobs=True, top_n_tokens=1)
        response = await router.stub.Generate(message)
        prefill = response.finished.prefill
        assert [token.id for token in prefill] == prompt
        assert not prefill[0].HasField("logprob")
        assert [token.logprob for token in prefill[1:]] == expected_prompt_logprobs(prompt)
        assert [[top.id for top in t.top] for t in response.tokens] == [
            [id_] for id_ in ids_of(response)
        ]
        assert response.tokens[0].logprob == -response.tokens[0].id / 4
        bare = await router.stub.Generate(request(prompt, max_new_tokens=3, logprobs=False))
        assert not bare.tokens[0].HasField("logprob")
        assert not bare.finished.prefill


async def test_embeddings_beside_answers(tmp_path: Path) -> None:
    async with running_router(tmp_path) as router:
        ids = prompts(1, seed=8)[0] * 3
        message = router_pb2.GenerateRequest(token_ids=router_pb2.TokenIds(ids=ids))
        kinds = {
            router_pb2.POOLING_UNSPECIFIED: Pooling.MEAN,
            router_pb2.POOLING_LAST: Pooling.LAST,
        }
        calls = [router.stub.Generate(request(prompt, max_new_tokens=9)) for prompt in prompts(5)]
        for asked, pooling in kinds.items():
            embedding = router_pb2.Embedding(pooling=asked, normalize=False)
            message.embedding.CopyFrom(embedding)
            response = await router.stub.Generate(message)
            assert list(response.finished.embedding) == pytest.approx(expected_pooled(ids, pooling))
            assert response.finished.reason == router_pb2.FINISH_REASON_POOLED
            assert not response.tokens and not response.finished.generated_tokens
        message.embedding.CopyFrom(router_pb2.Embedding())
        response = await router.stub.Generate(message)
        assert math.hypot(*response.finished.embedding) == pytest.approx(1)
        assert [len((await call).tokens) for call in calls] == [9] * 5
        router.assert_idle()


async def test_prefix_cache_hits_are_told(tmp_path: Path) -> None:
    async with running_router(tmp_path) as router:
        message = request(list(range(1, 41)), max_new_tokens=2)
        assert (await router.stub.Generate(message)).finished.cached_tokens == 0
        assert (await router.stub.Generate(message)).finished.cached_tokens >= 36
        assert router.metric("tgi_prefix_cache_hit_tokens") >= 36
        assert router.metric("tgi_kv_cache_cached_blocks") > 0


async def test_drain_finishes_what_runs_and_refuses_the_rest(tmp_path: Path) -> None:
    async with running_router(tmp_path, behaviour=Behaviour(step_seconds=0.01)) as router:
        message = request([1, 2], max_new_tokens=30)
        running = asyncio.ensure_future(_generate(router, message))
        await until(lambda: router.metric("tgi_generated_tokens") > 3)
        router.launcher.tell("drain", timeout=30)
        await until(lambda: router.parts.status.state == router_pb2.SERVER_STATE_DRAINING)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await router.stub.Generate(message)
        assert isinstance(errors.from_rpc_error(caught.value), errors.DrainingError)
        assert not router.launcher.said("drained")
        assert ids_of(await running) == answer_of(router, message)[0]
        await until(lambda: bool(router.launcher.said("drained")))


async def test_drain_has_a_limit(tmp_path: Path) -> None:
    async with running_router(tmp_path) as router:
        router.behaviour.gate.clear()
        running = asyncio.ensure_future(_generate(router, request([1], max_new_tokens=9)))
        await until(lambda: router.parts.engine.num_live == 1)
        router.launcher.tell("drain", timeout=0.1)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await running
        assert errors.from_rpc_error(caught.value).http_status == 503
        await until(lambda: bool(router.launcher.said("drained")))


async def test_a_new_router_drains_what_its_predecessor_left(tmp_path: Path) -> None:
    async with running_router(tmp_path, ready=False) as router:
        router.launcher.tell("drain", timeout=30)
        await until(lambda: router.parts.status.state == router_pb2.SERVER_STATE_DRAINING)
        await asyncio.sleep(0.3)  # until the gateway notices
        message = request([1, 2], max_new_tokens=30)
        stream = router.stub.Multiplex()
        submit = router_pb2.Submit(key=1, attempt=2, request=message)
        await stream.write(router_pb2.ClientMessage(hello=router_pb2.Hello(gateway_id="g")))
        await stream.write(router_pb2.ClientMessage(submit=submit))
        await until(lambda: router.parts.engine.num_live == 1)
        assert not router.launcher.said("drained")
        await router.launcher.start_group()
        ids: list[int] = []
        while len(ids) < 30:
            for keyed in all_events(await stream.read()):
                ids += [token.id for token in keyed.event.tokens.tokens]
        assert ids == answer_of(router, message)[0]
        await until(lambda: bool(router.launcher.said("drained")))


async def test_failed_answers_all_with_503(tmp_path: Path) -> None:
    async with running_router(tmp_path, behaviour=Behaviour(step_seconds=0.01)) as router:
        running = asyncio.ensure_future(_generate(router, request([1], max_new_tokens=99)))
        await until(lambda: router.metric("tgi_generated_tokens") > 3)
        await router.launcher.kill_group()
        router.launcher.tell("failed", message="the shards keep dying: out of luck")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await running
        error = errors.from_rpc_error(caught.value)
        assert isinstance(error, errors.UnavailableError)
        assert "out of luck" in error.message
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await router.stub.Generate(request([1], max_new_tokens=1))
        assert errors.from_rpc_error(caught.value).http_status == 503
        await until(lambda: bool(router.launcher.said("failed_delivered")))


async def test_nothing_is_taken_while_loading(tmp_path: Path) -> None:
    async with running_router(tmp_path, ready=False) as router:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await router.stub.Generate(request([1], max_new_tokens=1))
        error = errors.from_rpc_error(caught.value)
        assert isinstance(error, errors.UnavailableError)
        assert error.retry_after
        await router.launcher.start_group()
        await until(lambda: bool(router.launcher.said("ready")))
        assert (await router.stub.Generate(request([1], max_new_tokens=1))).finished.reason


async def test_too_little_memory_is_fatal_and_named(tmp_path: Path) -> None:
    behaviour = Behaviour(num_blocks=10)
    async with running_router(tmp_path, behaviour=behaviour, ready=False) as router:
        with pytest.raises(NotEnoughMemory, match="holds 40 tokens"):
            await router.launcher.start_group()
            await asyncio.wait_for(router.keeping, 5)


async def test_warm_up_gets_the_largest_step_and_all_ranks_the_least_memory(
    tmp_path: Path,
) -> None:
    async with running_router(tmp_path, num_shards=3) as router:
        assert router.launcher.group is not None
        for server in router.launcher.group.servers:
            assert [w.max_batch_prefill_tokens for w in server.warmups] == [32]
            assert server.shard.num_blocks == router.behaviour.num_blocks
        assert router.parts.status.info().max_batch_total_tokens == 256 * 4
