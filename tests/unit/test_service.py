"""The public gRPC service on a unix socket and TCP: calls, streams, keys, health."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from headgate import Client, SamplingParams
from headgate.proto import router_pb2, router_pb2_grpc
from headgate.proto.framing import frame, read_message, stream_path
from headgate.router import errors
from tests.unit.fake_shard_server import Behaviour, RunningRouter, running_router, until
from tests.unit.stream_gateway import drained, refused
from tests.unit.test_engine import answer_of, ids_of, request

ROOT = Path(__file__).resolve().parents[2]


# ------------------------------------------------------------------ plain calls


async def test_stream_begins_with_accepted_and_ends_with_finished(tmp_path: Path) -> None:
    async with running_router(tmp_path) as router:
        message = request([1, 2, 3], max_new_tokens=6)
        events = [event async for event in router.stub.GenerateStream(message)]
        kinds = [event.WhichOneof("event") for event in events]
        assert kinds == ["accepted"] + ["tokens"] * 6 + ["finished"]
        tokens = [token for event in events for token in event.tokens.tokens]
        assert [token.id for token in tokens] == answer_of(router, message)[0]
        finished = events[-1].finished
        assert finished.generated_text == "".join(event.tokens.text for event in events)
        assert finished.timings.inference >= finished.timings.time_to_first_token // 2 > 0
        assert events[0].accepted.input_tokens == 3


async def test_text_prompts_and_refusals(tmp_path: Path) -> None:
    async with running_router(tmp_path) as router:
        message = router_pb2.GenerateRequest(
            text="hello", parameters=router_pb2.Parameters(max_new_tokens=3)
        )
        response = await router.stub.Generate(message)
        assert response.accepted.prompt_characters == 5
        message.parameters.top_p = 7
        for call in (router.stub.Generate(message), drained(router.stub.GenerateStream(message))):
            error = await refused(call)
            assert isinstance(error, errors.ValidationError)
            assert error.field == "top_p"
        assert router.metric('tgi_request_failure{err="validation"}') == 2
        assert router.metric("tgi_request_count") == 3
        router.assert_idle()


async def test_leaving_frees_everything_at_once(tmp_path: Path) -> None:
    async with running_router(tmp_path, behaviour=Behaviour(step_seconds=0.01)) as router:
        unary = router.stub.Generate(request([1], max_new_tokens=150))
        stream = router.stub.GenerateStream(request(list(range(90)), max_new_tokens=60))
        await stream.read()
        await until(lambda: router.metric("tgi_generated_tokens") > 3)
        unary.cancel()
        stream.cancel()
        await until(lambda: router.parts.engine.num_live == 0, timeout=1)
        router.assert_idle()
        assert router.metric('tgi_request_failure{err="dropped"}') == 2


async def test_cancelling_by_id(tmp_path: Path) -> None:
    async with running_router(tmp_path, behaviour=Behaviour(step_seconds=0.01)) as router:
        alone = request([1], max_new_tokens=150)
        alone.request_id = "one"
        parts = [request([index], max_new_tokens=150) for index in (2, 3)]
        for index, part in enumerate(parts):
            part.request_id, part.call_id = f"call-{index}", "call"
        running = [router.stub.Generate(message) for message in (alone, *parts)]
        await until(lambda: router.metric("tgi_generated_tokens") > 3)
        for name, count in (("call", 2), ("one", 1), ("one", 0), ("nobody", 0)):
            answer = await router.stub.Cancel(router_pb2.CancelRequest(request_id=name))
            assert answer.cancelled == count
        for call in running:
            assert isinstance(await refused(call), errors.RequestCancelledError)
        assert isinstance(
            await refused(router.stub.Cancel(router_pb2.CancelRequest())), errors.ValidationError
        )
        assert router.metric('tgi_request_failure{err="cancelled"}') == 3
        router.assert_idle()


async def test_cancelling_while_the_prompt_is_tokenised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_router(tmp_path) as router:
        message = request([1], max_new_tokens=5)
        message.request_id = "slow"
        validate = router.parts.validator.validate
        entered, go_on = asyncio.Event(), asyncio.Event()

        async def slowly(*arguments: Any) -> Any:
            entered.set()
            await go_on.wait()
            return await validate(*arguments)

        monkeypatch.setattr(router.parts.validator, "validate", slowly)
        call = asyncio.ensure_future(refused(router.stub.Generate(message)))
        await entered.wait()
        answer = await router.stub.Cancel(router_pb2.CancelRequest(request_id="slow"))
        go_on.set()
        assert answer.cancelled == 1
        assert isinstance(await call, errors.RequestCancelledError)
        router.assert_idle()


async def test_too_many_at_once_are_refused_and_the_others_unharmed(tmp_path: Path) -> None:
    async with running_router(tmp_path, max_concurrent_requests=3) as router:
        router.behaviour.gate.clear()
        messages = [request([k + 1], max_new_tokens=4) for k in range(3)]
        running = [asyncio.ensure_future(_generate(router, message)) for message in messages]
        await until(lambda: router.parts.engine.num_live == 3)
        error = await refused(router.stub.Generate(messages[0]))
        assert isinstance(error, errors.OverloadedError)
        assert error.retry_after is not None
        assert error.retry_after >= 1
        router.behaviour.gate.set()
        for message, call in zip(messages, running, strict=True):
            assert ids_of(await call) == answer_of(router, message)[0]
        assert router.metric('tgi_request_failure{err="overloaded"}') == 1
        router.assert_idle()


async def _generate(router: RunningRouter, message: Any) -> router_pb2.GenerateResponse:
    return await router.stub.Generate(message)


async def test_a_stop_text_frees_the_row(tmp_path: Path) -> None:
    async with running_router(tmp_path) as router:
        message = request([1, 2], max_new_tokens=100)
        whole = await router.stub.Generate(message)
        text = whole.finished.generated_text
        stop = text[20:24]
        message.parameters.stop.append(stop)
        message.parameters.include_stop = False
        response = await router.stub.Generate(message)
        assert response.finished.reason == router_pb2.FINISH_REASON_STOP_SEQUENCE
        assert response.finished.generated_text == text[: text.index(stop)]
        assert response.finished.stop_sequence == stop
        router.assert_idle()


async def test_a_stream_that_nobody_reads_stalls_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headgate.router.service.MAX_UNREAD_EVENTS", 20)
    async with running_router(tmp_path) as router:
        options = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
        async with grpc.aio.insecure_channel(router.unix, options=options) as channel:
            stub = router_pb2_grpc.RouterStub(channel)
            message = request([1], max_new_tokens=150, top_n_tokens=1)
            message.request_id = "x" * 10
            unread = [stub.GenerateStream(message) for _ in range(3)]
            other = request([9], max_new_tokens=100)
            assert ids_of(await router.stub.Generate(other)) == answer_of(router, other)[0]
            for stream in unread:
                stream.cancel()
        await until(lambda: router.parts.engine.num_live == 0)


async def test_tokenize_info_metrics(tmp_path: Path) -> None:
    async with running_router(tmp_path) as router:
        answer = await router.stub.Tokenize(router_pb2.TokenizeRequest(text="hé 😀"))
        assert answer.tokens[0].text == "h"
        assert answer.tokens[-1].stop == 4
        info = await router.stub.Info(router_pb2.InfoRequest())
        assert info.model_id == "test/model"
        assert info.chat_template == "{{ messages }}"
        assert (info.bos_token, info.eos_token) == ("<s>", "</s>")
        assert info.state == router_pb2.SERVER_STATE_READY
        assert info.epoch == 1
        text = (await router.stub.Metrics(router_pb2.MetricsRequest())).text
        assert b"tgi_batch_max_total_tokens 1024\n" in text


# ------------------------------------------------------- keys, health, reflection


async def test_api_key_on_both_addresses(tmp_path: Path) -> None:
    async with running_router(tmp_path, api_key="secret") as router:
        message = request([1], max_new_tokens=2)
        for address in (router.unix, f"127.0.0.1:{router.port}"):
            async with grpc.aio.insecure_channel(address) as channel:
                stub = router_pb2_grpc.RouterStub(channel)
                for key in (None, "Bearer wrong", "Bearer ", "secret", "Basic secret"):
                    metadata = [("authorization", key)] if key is not None else []
                    error = await refused(stub.Generate(message, metadata=metadata))
                    assert isinstance(error, errors.UnauthorizedError)
                    stream = stub.GenerateStream(message, metadata=metadata)
                    assert (await refused(drained(stream))).http_status == 401
                metadata = [("authorization", "Bearer secret")]
                assert (await stub.Generate(message, metadata=metadata)).finished.reason
                assert (await stub.Metrics(router_pb2.MetricsRequest())).text
                assert await _health(channel, "") == "SERVING"
                assert router_pb2.DESCRIPTOR.services_by_name["Router"].full_name in (
                    await _reflected(channel)
                )
        assert (await refused(drained(router.stub.Multiplex(_silence())))).http_status == 401


async def _silence() -> AsyncIterator[router_pb2.ClientMessage]:
    """To gRPC's client a message that meets the end of its call is an internal error."""
    await asyncio.Event().wait()
    yield router_pb2.ClientMessage()


async def test_the_socket_for_gateways_wants_a_hello_with_the_key(tmp_path: Path) -> None:
    def hello(key: str) -> bytes:
        said = router_pb2.Hello(gateway_id="x", api_key=key)
        return frame(router_pb2.ClientMessage(hello=said))

    no_hello = frame(router_pb2.ClientMessage(cancel=1))
    async with running_router(tmp_path, api_key="secret") as router:
        for first in (hello("secret"), hello("wrong"), no_hello, b"\xff" * 9, b"\1\0\0\0\xff"):
            reader, writer = await asyncio.open_unix_connection(stream_path(router.unix))
            writer.write(first)
            answer = read_message(reader, router_pb2.ServerMessage())
            assert (await asyncio.wait_for(answer, 5) is not None) == (first == hello("secret"))
            writer.close()


async def _health(channel: grpc.aio.Channel, service: str) -> str:
    stub = health_pb2_grpc.HealthStub(channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


async def _reflected(channel: grpc.aio.Channel) -> list[str]:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    requests = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    async for answer in stub.ServerReflectionInfo(requests):
        return [service.name for service in answer.list_services_response.service]
    return []


async def test_health_follows_the_state(tmp_path: Path) -> None:
    name = "headgate.router.v1.Router"
    async with running_router(tmp_path, ready=False) as router:

        async def told() -> tuple[str, str]:
            await asyncio.sleep(0.05)
            return await _health(router.channel, ""), await _health(router.channel, name)

        assert await told() == ("NOT_SERVING", "NOT_SERVING")
        await router.launcher.start_group()
        await until(lambda: bool(router.launcher.said("ready")))
        assert await told() == ("SERVING", "SERVING")
        await router.launcher.kill_group()
        await until(lambda: router.parts.status.state == router_pb2.SERVER_STATE_RECOVERING)
        assert await told() == ("SERVING", "NOT_SERVING")
        router.launcher.tell("failed", message="over")
        await until(lambda: bool(router.launcher.said("failed_delivered")))
        assert await told() == ("NOT_SERVING", "NOT_SERVING")


# ------------------------------------------------------------------ Python client


async def test_client(tmp_path: Path) -> None:
    async with running_router(tmp_path, api_key="secret") as router:
        address = f"127.0.0.1:{router.port}"
        await asyncio.to_thread(_use_client, address)
        await until(lambda: router.parts.engine.num_live == 0)
        router.assert_idle()


def _use_client(address: str) -> None:
    with Client(address, api_key="secret", timeout=30) as client:
        whole = client.generate("abc", max_new_tokens=9, temperature=0.5, seed=3)
        assert (len(whole.tokens), whole.seed, whole.finish_reason) == (9, 3, "length")
        params = SamplingParams(
            max_tokens=9, temperature=0.5, seed=3, logprobs=0, include_stop_str_in_output=True
        )
        pieces = list(client.stream("abc", params))
        assert "".join(piece.text for piece in pieces) == whole.text
        ids = [span.id for span in client.tokenize("abc")]
        last = pieces[-1].generation
        assert last is not None and last.cached_tokens == len(ids) - 1
        assert replace(last, cached_tokens=whole.cached_tokens) == whole
        assert client.generate(ids, params).tokens == whole.tokens
        assert client.generate("abc", params, stop=whole.text[3:5]).text == whole.text[:5]
        assert client.info().model_id == "test/model"
        assert client.cancel("nobody") == 0
        for piece in client.stream("abc", max_new_tokens=100):
            assert piece.tokens
            break
        with pytest.raises(errors.ValidationError, match="top_k"):
            client.generate("abc", top_k=0)
        with pytest.raises(errors.ValidationError, match="top_k"):
            client.generate("abc", top_k=-1)
        with pytest.raises(TypeError, match="max_tokens"):
            client.generate("abc", max_tokens=5)
    with Client(address) as client, pytest.raises(errors.UnauthorizedError):
        client.generate("abc")


async def test_the_example_runs(tmp_path: Path) -> None:
    async with running_router(tmp_path) as router:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "docs/examples/grpc_client.py",
            f"127.0.0.1:{router.port}",
            cwd=ROOT,
            env={"PYTHONPATH": str(ROOT), "PATH": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        output, _ = await asyncio.wait_for(process.communicate(), 30)
        assert process.returncode == 0, output.decode()
        for word in ("model: test/model", "refused: validation (422)", "finished: "):
            assert word in output.decode()


def test_router_and_gateway_run_without_torch() -> None:
    script = (
        "import sys, headgate.router.__main__, headgate.router.gateway.__main__\n"
        "found = {'torch', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'imported: {found}' if found else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
