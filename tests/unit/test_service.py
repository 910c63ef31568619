"""The public gRPC service on a unix socket and TCP: calls, streams, Multiplex, keys, health."""

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
from headgate.proto.token_columns import all_events
from headgate.router import errors
from headgate.router.framing import frame, read_message, stream_path
from headgate.router.multiplex import MAX_HELD_EVENTS, KeyedRequest, MultiplexStream
from headgate.router.output_processor import Outcome
from headgate.router.status import ServerStatus
from headgate.router.tokenizer import ChatFiles
from tests.unit.fake_shard_server import Behaviour, RunningRouter, running_router, until
from tests.unit.test_engine import answer_of, ids_of, request
from tests.unit.test_validation import CONFIG

ROOT = Path(__file__).resolve().parents[2]


class Gateway:
    """A gateway's end of Multiplex; remembers what it is told."""

    def __init__(self, router: RunningRouter, gateway_id: str = "gateway-0") -> None:
        self._router = router
        self._outbox: asyncio.Queue[router_pb2.ClientMessage | None] = asyncio.Queue()
        self.events: list[router_pb2.KeyedEvent] = []
        self.statuses: list[router_pb2.ServerStatus] = []
        self.batches: list[int] = []  # events per message
        self.in_columns = 0  # events that travelled as columns
        self.say(hello=router_pb2.Hello(gateway_id=gateway_id, api_key="secret"))
        self._task = asyncio.ensure_future(self._read())

    async def _outgoing(self) -> AsyncIterator[router_pb2.ClientMessage]:
        while (message := await self._outbox.get()) is not None:
            yield message

    def _incoming(self) -> AsyncIterator[router_pb2.ServerMessage]:
        return self._router.stub.Multiplex(self._outgoing())

    async def _read(self) -> None:
        async for message in self._incoming():
            events = list(all_events(message))
            self.in_columns += len(message.tokens.texts)
            self.events.extend(events)
            if events:
                self.batches.append(len(events))
            if message.HasField("status"):
                self.statuses.append(message.status)

    def say(self, **fields: Any) -> None:
        self._outbox.put_nowait(router_pb2.ClientMessage(**fields))

    def submit(
        self, key: int, message: router_pb2.GenerateRequest, attempt: int = 1, **fields: Any
    ) -> None:
        submit = router_pb2.Submit(key=key, attempt=attempt, request=message, **fields)
        self.say(submit=submit)

    def of(self, key: int, attempt: int = 1) -> list[router_pb2.GenerateEvent]:
        return [e.event for e in self.events if (e.key, e.attempt) == (key, attempt)]

    def tokens(self, key: int, attempt: int = 1) -> list[router_pb2.Token]:
        return [token for event in self.of(key, attempt) for token in event.tokens.tokens]

    def text(self, key: int, attempt: int = 1) -> str:
        return "".join(event.tokens.text for event in self.of(key, attempt))

    def ended(self, key: int, attempt: int = 1) -> bool:
        return any(e.WhichOneof("event") in ("finished", "error") for e in self.of(key, attempt))

    async def over(self) -> None:
        """Until the router ends the stream; raises what it says."""
        await self._task

    async def leave(self) -> None:
        self._task.cancel()
        await asyncio.wait((self._task,))


class LocalGateway(Gateway):
    """One that speaks over the router's socket instead."""

    async def _incoming(self) -> AsyncIterator[router_pb2.ServerMessage]:
        reader, writer = await asyncio.open_unix_connection(stream_path(self._router.unix))
        writing = asyncio.ensure_future(self._write(writer))
        try:
            while (message := await read_message(reader, router_pb2.ServerMessage())) is not None:
                yield message
        finally:
            writing.cancel()
            writer.close()

    async def _write(self, writer: asyncio.StreamWriter) -> None:
        async for message in self._outgoing():
            writer.write(frame(message))


of_both_kinds = pytest.mark.parametrize("kind", [Gateway, LocalGateway])


async def refused(call: Any) -> errors.RouterError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return errors.from_rpc_error(caught.value)


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
        for call in (router.stub.Generate(message), _drained(router.stub.GenerateStream(message))):
            error = await refused(call)
            assert isinstance(error, errors.ValidationError)
            assert error.field == "top_p"
        assert router.metric('tgi_request_failure{err="validation"}') == 2
        assert router.metric("tgi_request_count") == 3
        router.assert_idle()


async def _drained(stream: AsyncIterator[Any]) -> None:
    async for _ in stream:
        pass


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


# ------------------------------------------------------------------- multiplexed


@of_both_kinds
async def test_many_requests_over_one_stream_in_batches(
    tmp_path: Path, kind: type[Gateway]
) -> None:
    async with running_router(tmp_path) as router:
        gateway = kind(router)
        messages = {key: request([key], max_new_tokens=20) for key in range(1, 13)}
        for key, message in messages.items():
            gateway.submit(key, message)
        await until(lambda: all(gateway.ended(key) for key in messages))
        for key, message in messages.items():
            assert [token.id for token in gateway.tokens(key)] == answer_of(router, message)[0]
            assert gateway.of(key)[0].WhichOneof("event") == "accepted"
            assert gateway.of(key)[-1].finished.generated_text == gateway.text(key)
        assert max(gateway.batches) >= 12  # a step's events in one message
        assert gateway.in_columns >= 12 * 15  # all tokens but odd ones
        assert gateway.statuses[0].state == router_pb2.SERVER_STATE_READY
        assert gateway.statuses[0].info.model_id == "test/model"
        router.assert_idle()
        await gateway.leave()


def token(index: int, *, special: bool = False) -> Outcome:
    outcome = Outcome(0, index, index, "a", token_id=5, token_text="a")
    outcome.special = special
    return outcome


def stream_of_nothing() -> MultiplexStream:
    """One that is only posted to."""
    return MultiplexStream(None, None, ServerStatus(CONFIG, ChatFiles()))  # type: ignore[arg-type]


async def test_an_end_travels_with_its_last_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the gateway would have sent the token already, and would need an event more."""
    monkeypatch.setattr("headgate.router.multiplex.MAX_EVENTS_PER_MESSAGE", 2)
    stream = stream_of_nothing()
    keyed = KeyedRequest(1, 1, stream)
    stream._requests = {1: keyed}
    for index in range(4):
        keyed.tokens(token(index, special=index == 3))
    keyed.send(router_pb2.GenerateEvent(finished=router_pb2.Finished()))
    messages = stream.messages()
    await anext(messages)  # the status
    sent = [list(all_events(await anext(messages))) for _ in range(2)]
    kinds = [[event.event.WhichOneof("event") for event in events] for events in sent]
    assert kinds == [["tokens"] * 2, ["tokens", "tokens", "finished"]]
    await messages.aclose()


async def test_columns_do_not_overtake_events_of_their_request() -> None:
    stream = stream_of_nothing()
    first, second = KeyedRequest(1, 1, stream), KeyedRequest(2, 1, stream)
    stream._requests = {1: first, 2: second}
    first.send(router_pb2.GenerateEvent(accepted=router_pb2.Accepted()))
    second.tokens(token(0))  # joins the message that accepts the first
    first.tokens(token(0))
    first.tokens(token(1, special=True))
    second.tokens(token(1))
    first.tokens(token(2))
    first.send(router_pb2.GenerateEvent(finished=router_pb2.Finished()))
    messages = stream.messages()
    await anext(messages)  # the status
    sent = [await anext(messages) for _ in range(3)]
    assert [len(message.tokens.texts) for message in sent] == [1, 2, 1]
    events = [event for message in sent for event in all_events(message)]
    kinds = [(event.key, event.event.WhichOneof("event")) for event in events]
    assert [kind for key, kind in kinds if key == 1] == ["accepted", *["tokens"] * 3, "finished"]
    indices = [
        e.event.tokens.first_index for e in events if e.event.WhichOneof("event") == "tokens"
    ]
    assert indices == [0, 0, 1, 1, 2]
    await messages.aclose()


async def test_hello_comes_first(tmp_path: Path) -> None:
    async with running_router(tmp_path) as router:
        call = router.stub.Multiplex(iter([router_pb2.ClientMessage(cancel=1)]))
        error = await refused(_drained(call))
        assert "hello" in error.message


@of_both_kinds
async def test_refusals_and_cancellations_are_by_key(tmp_path: Path, kind: type[Gateway]) -> None:
    async with running_router(tmp_path, behaviour=Behaviour(step_seconds=0.01)) as router:
        gateway = kind(router)
        gateway.submit(1, request([1], max_new_tokens=0))
        gateway.submit(2, request([2], max_new_tokens=150))
        gateway.submit(3, request([3], max_new_tokens=10))
        gateway.say(failure=router_pb2.Failure(error_type="template_error"))
        await until(lambda: gateway.ended(1) and len(gateway.tokens(2)) > 3)
        assert gateway.of(1)[-1].error.error_type == "validation"
        assert gateway.of(1)[-1].error.http_status == 422
        gateway.say(cancel=2)
        await until(lambda: gateway.ended(3) and router.parts.engine.num_live == 0)
        seen = len(gateway.tokens(2))
        await asyncio.sleep(0.1)
        assert len(gateway.tokens(2)) == seen
        assert not gateway.ended(2)
        assert router.metric('tgi_request_failure{err="template"}') == 1
        router.assert_idle()
        await gateway.leave()


@of_both_kinds
async def test_a_gateway_that_goes_takes_its_requests_with_it(
    tmp_path: Path, kind: type[Gateway]
) -> None:
    async with running_router(tmp_path, behaviour=Behaviour(step_seconds=0.01)) as router:
        gateway, other = kind(router, "a"), kind(router, "b")
        for key in range(5):
            gateway.submit(key, request([key], max_new_tokens=150))
        message = request([9], max_new_tokens=20)
        other.submit(0, message)
        await until(lambda: len(gateway.tokens(4)) > 2)
        await gateway.leave()
        await until(lambda: other.ended(0) and router.parts.engine.num_live == 0, timeout=2)
        assert [token.id for token in other.tokens(0)] == answer_of(router, message)[0]
        await other.leave()


@of_both_kinds
async def test_a_gateway_that_does_not_read_is_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Gateway]
) -> None:
    monkeypatch.setattr("headgate.router.multiplex.MAX_UNSENT_EVENTS", 3)
    async with running_router(tmp_path) as router:
        gateway = kind(router)
        for key in range(8):  # one step brings more events than are kept
            gateway.submit(key, request([key], max_new_tokens=100))
        await asyncio.wait_for(gateway.over(), 5)
        await until(lambda: router.parts.engine.num_live == 0)


async def test_a_gateway_that_comes_back_replaces_its_stream(tmp_path: Path) -> None:
    async with running_router(tmp_path, behaviour=Behaviour(step_seconds=0.01)) as router:
        first = Gateway(router)
        first.submit(1, request([1], max_new_tokens=150))
        await until(lambda: len(first.tokens(1)) > 2)
        second = Gateway(router)
        await until(lambda: router.parts.engine.num_live == 0, timeout=2)
        message = request([1], max_new_tokens=5)
        second.submit(1, message, attempt=2)
        await until(lambda: second.ended(1, 2))
        assert [token.id for token in second.tokens(1, 2)] == answer_of(router, message)[0]
        assert isinstance(await refused(first.over()), errors.ReplacedError)
        await second.leave()


async def test_attempts_of_one_key(tmp_path: Path) -> None:
    async with running_router(tmp_path, behaviour=Behaviour(step_seconds=0.01)) as router:
        gateway = Gateway(router)
        message = request([1], max_new_tokens=30)
        gateway.submit(1, message, attempt=2)
        gateway.submit(1, message, attempt=2)  # again: no second answer
        gateway.submit(1, message, attempt=1)  # late: older than what runs
        await until(lambda: len(gateway.tokens(1, 2)) > 3)
        assert router.parts.engine.num_live == 1
        gateway.submit(1, message, attempt=3)
        await until(lambda: gateway.ended(1, 3))
        assert not gateway.ended(1, 2)
        assert [token.id for token in gateway.tokens(1, 3)] == answer_of(router, message)[0]
        router.assert_idle()
        await gateway.leave()


@pytest.mark.parametrize("cut", [1, 7, 29])
@pytest.mark.parametrize("sampled", [False, True])
async def test_an_answer_goes_on_at_a_new_router(tmp_path: Path, cut: int, sampled: bool) -> None:
    async with running_router(tmp_path) as router:
        gateway = Gateway(router)
        message = request([1, 2, 3], max_new_tokens=30, do_sample=sampled)
        gateway.submit(1, message)
        await until(lambda: gateway.ended(1))
        accepted = gateway.of(1)[0].accepted
        progress = router_pb2.DeliveredAnswer(
            tokens=gateway.tokens(1)[:cut],
            text_offset=len("".join(e.tokens.text for e in gateway.of(1)[1 : cut + 1])),
        )
        delivered = router_pb2.Delivered(
            answers=[progress], seed=accepted.seed if sampled else None
        )
        gateway.submit(1, message, attempt=2, delivered=delivered)
        await until(lambda: gateway.ended(1, 2))
        again = gateway.of(1, 2)
        assert again[1].tokens.first_index == cut
        assert [t.id for t in gateway.tokens(1, 2)] == [t.id for t in gateway.tokens(1)[cut:]]
        assert again[-1].finished.generated_text == gateway.of(1)[-1].finished.generated_text
        assert again[-1].finished.generated_tokens == 30
        assert gateway.text(1)[progress.text_offset :] == gateway.text(1, 2)
        router.assert_idle()
        await gateway.leave()


async def test_an_answer_that_was_complete_but_for_its_end(tmp_path: Path) -> None:
    async with running_router(tmp_path) as router:
        gateway = Gateway(router)
        message = request([1, 2, 3], max_new_tokens=5)
        gateway.submit(1, message)
        await until(lambda: gateway.ended(1))
        progress = router_pb2.DeliveredAnswer(
            tokens=gateway.tokens(1), text_offset=len(gateway.text(1))
        )
        delivered = router_pb2.Delivered(answers=[progress])
        gateway.submit(1, message, attempt=2, delivered=delivered)
        await until(lambda: gateway.ended(1, 2))
        assert not gateway.tokens(1, 2)
        finished = gateway.of(1, 2)[-1].finished
        assert finished.reason == router_pb2.FINISH_REASON_LENGTH
        assert finished.generated_text == gateway.text(1)
        router.assert_idle()
        await gateway.leave()


async def test_resubmissions_are_taken_while_loading(tmp_path: Path) -> None:
    async with running_router(tmp_path, ready=False) as router:
        gateway = Gateway(router)
        message = request([1], max_new_tokens=5)
        gateway.submit(1, message, attempt=2)
        gateway.submit(2, message)
        await until(lambda: gateway.ended(2))
        assert gateway.of(2)[-1].error.error_type == "unavailable"
        await router.launcher.start_group()
        await until(lambda: gateway.ended(1, 2))
        assert [token.id for token in gateway.tokens(1, 2)] == answer_of(router, message)[0]
        states = [status.state for status in gateway.statuses]
        assert states[0] == router_pb2.SERVER_STATE_LOADING
        assert states[-1] == router_pb2.SERVER_STATE_READY
        await gateway.leave()


async def test_a_paused_request_holds_its_events_back(tmp_path: Path) -> None:
    async with running_router(tmp_path) as router:
        gateway = Gateway(router)
        message = request([1], max_new_tokens=30)
        gateway.submit(1, message)
        gateway.say(pause=1)
        other = request([2], max_new_tokens=30)
        gateway.submit(2, other)
        await until(lambda: gateway.ended(2) and router.parts.engine.num_live == 0)
        assert not gateway.ended(1)
        gateway.say(resume=1)
        await until(lambda: gateway.ended(1))
        assert [token.id for token in gateway.tokens(1)] == answer_of(router, message)[0]
        await gateway.leave()


async def test_a_request_paused_for_too_long_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert MAX_HELD_EVENTS > 1000
    monkeypatch.setattr("headgate.router.multiplex.MAX_HELD_EVENTS", 10)
    async with running_router(tmp_path) as router:
        gateway = Gateway(router)
        gateway.submit(1, request([1], max_new_tokens=100))
        gateway.say(pause=1)
        await until(lambda: router.metric('tgi_request_failure{err="dropped"}') == 1)
        router.assert_idle()
        gateway.say(resume=1)
        await until(lambda: gateway.ended(1))
        assert gateway.of(1)[-1].error.error_type == "slow_client"
        await gateway.leave()


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
                    assert (await refused(_drained(stream))).http_status == 401
                metadata = [("authorization", "Bearer secret")]
                assert (await stub.Generate(message, metadata=metadata)).finished.reason
                assert (await stub.Metrics(router_pb2.MetricsRequest())).text
                assert await _health(channel, "") == "SERVING"
                assert router_pb2.DESCRIPTOR.services_by_name["Router"].full_name in (
                    await _reflected(channel)
                )
        hello = iter([router_pb2.ClientMessage(hello=router_pb2.Hello(gateway_id="x"))])
        assert (await refused(_drained(router.stub.Multiplex(hello)))).http_status == 401


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
