"""Many requests over one stream to the router: on a unix socket, by gRPC and framed."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import grpc
import pytest

from headgate.proto import router_pb2
from headgate.router import errors
from headgate.router.multiplex import MAX_HELD_EVENTS, KeyedRequest, MultiplexStream
from headgate.router.output_processor import Outcome
from headgate.router.status import ServerStatus
from headgate.router.tokenizer import ChatFiles
from tests.unit.fake_shard_server import Behaviour, running_router, until
from tests.unit.stream_events import all_events
from tests.unit.stream_gateway import Gateway, drained, of_both_kinds, refused
from tests.unit.test_engine import answer_of, request
from tests.unit.test_validation import CONFIG


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
        error = await refused(drained(call))
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
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: type[Gateway],
) -> None:
    monkeypatch.setattr("headgate.router.multiplex.MAX_UNSENT_EVENTS", 3)
    async with running_router(tmp_path) as router:
        gateway = kind(router)
        for key in range(8):  # one step brings more events than are kept
            gateway.submit(key, request([key], max_new_tokens=100))
        # gRPC tells of a write instead that met the end of the stream.
        with contextlib.suppress(grpc.aio.AioRpcError):
            await asyncio.wait_for(gateway.over(), 5)
        assert "gateway-0 does not read" in caplog.text
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
