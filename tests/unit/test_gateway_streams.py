"""The stream to the router under trouble: disconnects, slow clients, a router that dies."""

from __future__ import annotations

import asyncio

from headgate.proto.token_columns import NO_LOGPROB, Row, encode_columns
from headgate.router.gateway.exchange import WRITE_CHUNK
from headgate.router.gateway.server_state import State
from tests.unit import fake_router as fake
from tests.unit.fake_router import pb
from tests.unit.running_gateway import RunningGateway, events_of, until

CHAT = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}


async def never(conversation: fake.Conversation, submit: pb.Submit) -> None:
    """Accepts and then says nothing."""
    conversation.send(submit, fake.accepted())


async def silent(conversation: fake.Conversation, submit: pb.Submit) -> None:
    """Does not even accept."""


async def test_a_client_that_leaves_cancels() -> None:
    for script in (never, silent):
        for path, body in (
            ("/generate", {"inputs": "Hi"}),
            ("/generate_stream", {"inputs": "Hi"}),
            ("/v1/completions", {"prompt": ["a", "b"], "stream": True}),
        ):
            async with RunningGateway(script) as running:
                _, writer = await running.raw(path, body)
                expected = 2 if path == "/v1/completions" else 1
                await until(lambda r=running, n=expected: len(r.router.submits) == n)  # type: ignore[misc]
                assert not running.router.last.got("cancel")
                writer.close()
                await until(
                    lambda r=running, n=expected: len(r.router.last.got("cancel")) == n  # type: ignore[misc]
                )
                keys = {message.cancel for message in running.router.last.got("cancel")}
                assert keys == {submit.key for submit in running.router.submits}
                assert not running.gateway.services.client._calls


async def test_finished_requests_are_not_cancelled() -> None:
    async with RunningGateway() as running:
        await running.http.post("/generate", json={"inputs": "Hi"})
        await running.stream("/generate_stream", {"inputs": "Hi"})
        await running.stream("/v1/completions", {"prompt": ["a", "b"], "stream": True})
        assert not running.router.last.got("cancel")
        assert not running.gateway.services.client._calls
        assert not running.gateway.services.housekeeper._writers


async def test_keep_alive_comments() -> None:
    go_on = asyncio.Event()

    async def script(conversation: fake.Conversation, submit: pb.Submit) -> None:
        conversation.send(submit, fake.accepted())
        await go_on.wait()
        conversation.send(
            submit, fake.tokens(0, fake.token(5, "a"), text="a", offset=0), fake.finished("a", 1)
        )

    async with RunningGateway(script, keep_alive_seconds=0.05) as running:
        reader, writer = await running.raw("/v1/chat/completions", CHAT)
        await reader.readuntil(b"\r\n\r\n")
        for _ in range(3):
            assert (await reader.readuntil(b"\n\n")).endswith(b":\n\n")
        go_on.set()
        assert b"data: " in await reader.readuntil(b"[DONE]\n\n")
        writer.close()


async def test_events_of_one_message_go_out_in_one_write() -> None:
    sends: list[bytes] = []

    async def script(conversation: fake.Conversation, submit: pb.Submit) -> None:
        conversation.send(submit, fake.accepted())
        await asyncio.sleep(0.05)
        new = [fake.token(i, "a") for i in range(5)]
        conversation.send(submit, fake.tokens(0, *new, text="aaaaa", offset=0))
        await asyncio.sleep(0.05)
        last = fake.tokens(5, fake.token(9, "b"), text="b", offset=5)
        conversation.send(submit, last, fake.finished("aaaaab", 6))

    async with RunningGateway(script) as running:
        app = running.gateway._app

        async def spying(scope, receive, send):  # type: ignore[no-untyped-def]
            async def spy(message):  # type: ignore[no-untyped-def]
                if message["type"] == "http.response.body":
                    sends.append(message["body"])
                await send(message)

            def spy_chunk(data: bytes) -> bool:
                sends.append(data)
                return bool(write_chunk(data))

            write_chunk = scope[WRITE_CHUNK]
            scope[WRITE_CHUNK] = spy_chunk
            await app(scope, receive, spy)

        running.gateway._app = spying  # type: ignore[assignment]
        await running.stream("/generate_stream", {"inputs": "Hi"})
    assert [send.count(b"data: ") for send in sends] == [5, 1]


async def test_tokens_in_columns_are_as_good_as_events() -> None:
    words = ["Ja", "pan", " é", ""]

    async def script(conversation: fake.Conversation, submit: pb.Submit) -> None:
        conversation.send(submit, fake.accepted())
        await asyncio.sleep(0.02)
        key, attempt = submit.key, submit.attempt
        offsets = [len("".join(words[:index])) for index in range(len(words))]
        rows: list[Row] = [
            (key, attempt, 0, index, offsets[index], 40 + index, -0.5, word)
            for index, word in enumerate(words)
        ]
        stale: Row = (key, attempt + 1, 0, 0, 0, 7, -1.0, "x")
        stranger: Row = (99, 1, 0, 0, 0, 7, -1.0, "x")
        columns = encode_columns([stale, stranger, *rows, *rows])  # what is there counts once
        conversation.outbox.put_nowait(pb.ServerMessage(tokens=columns))
        await asyncio.sleep(0.02)
        last = (key, attempt, 0, 4, 7, 44, NO_LOGPROB, "!")
        end = pb.KeyedEvent(key=key, attempt=attempt, event=fake.finished("Japan é!", 5))
        message = pb.ServerMessage(tokens=encode_columns([last]), events=[end])
        conversation.outbox.put_nowait(message)

    async with RunningGateway(script) as running:
        events = await running.stream("/generate_stream", {"inputs": "Hi"})
    assert [event["token"]["text"] for event in events] == [*words, "!"]
    assert [event["token"]["id"] for event in events] == [40, 41, 42, 43, 44]
    assert [event["token"]["logprob"] for event in events] == [-0.5] * 4 + [None]
    assert events[-1]["generated_text"] == "Japan é!"


async def test_a_client_that_reads_nothing_pauses_its_own_request() -> None:
    word = "x" * 1000

    async def script(conversation: fake.Conversation, submit: pb.Submit) -> None:
        conversation.send(submit, fake.accepted())
        if submit.request.text == "quick":
            await fake.answer(conversation, submit)
            return
        count = 0
        while not conversation.got("pause"):
            new = [fake.token(5, word) for _ in range(64)]
            offset = count * len(word)
            conversation.send(submit, fake.tokens(count, *new, text=word * 64, offset=offset))
            count += 64
            await asyncio.sleep(0.002)
        while not conversation.got("resume"):
            await asyncio.sleep(0.005)
        conversation.send(submit, fake.finished("", count))

    async with RunningGateway(script, write_buffer_limit=4096) as running:
        reader, writer = await running.raw("/generate_stream", {"inputs": "Hi"})
        await until(lambda: running.router.submits and running.router.last.got("pause"), 20)
        # Others are served meanwhile.
        quick = await running.http.post("/generate", json={"inputs": "quick"})
        assert quick.status_code == 200
        held = next(iter(running.gateway.services.housekeeper._writers))
        assert held._size < 10_000_000
        text = b""
        while b'"generated_text":""' not in text[-4096:]:
            part = await reader.read(1 << 16)
            assert part
            text += part
        writer.close()
        assert len(running.router.last.got("pause")) == 1
        assert len(running.router.last.got("resume")) == 1


async def test_a_client_that_reads_nothing_for_long_is_cancelled() -> None:
    async def script(conversation: fake.Conversation, submit: pb.Submit) -> None:
        conversation.send(submit, fake.accepted())
        count = 0
        while not conversation.got("cancel"):
            new = [fake.token(5, "x" * 1000) for _ in range(64)]
            if not conversation.got("pause"):
                conversation.send(submit, fake.tokens(count, *new, text="", offset=0))
                count += 64
            await asyncio.sleep(0.005)

    async with RunningGateway(script, slow_client_timeout=0.2) as running:
        reader, writer = await running.raw("/generate_stream", {"inputs": "Hi"})
        await until(lambda: running.router.submits and running.router.last.got("cancel"), 20)
        text = b""
        while b"slow_client" not in text[-200_000:]:
            part = await reader.read(1 << 16)
            assert part
            text += part
        writer.close()


async def test_streams_go_on_when_the_router_died() -> None:
    started = asyncio.Event()

    async def half(conversation: fake.Conversation, submit: pb.Submit) -> None:
        conversation.send(submit, fake.accepted(seed=9))
        word = fake.WORDS[0]
        conversation.send(submit, fake.tokens(0, fake.token(11, word), text=word, offset=0))
        started.set()

    async with RunningGateway(half) as running:
        reader, writer = await running.raw("/v1/chat/completions", CHAT)
        await started.wait()
        await reader.readuntil(b" Tokyo")
        await running.router.die()
        await running.until_state(State.RECOVERING)
        assert (await running.http.get("/health")).status_code == 200
        assert (await running.http.get("/health/ready")).status_code == 503
        late = asyncio.create_task(running.http.post("/generate", json={"inputs": "waits"}))
        await asyncio.sleep(0.05)
        async with running.restart_router() as router:
            rest = await reader.readuntil(b"[DONE]\n\n")
            assert (await late).json() == {"generated_text": " Tokyo is big"}
            submit = next(s for s in router.submits if s.attempt == 2)
            assert submit.delivered.seed == 9
            (progress,) = submit.delivered.answers
            assert progress.text_offset == len(" Tokyo")
            assert [token.id for token in progress.tokens] == [11]
            assert not progress.finished
            assert b" Tokyo" not in rest and b" is" in rest and b'"length"' in rest
        writer.close()


async def test_whole_answers_survive_the_router_too() -> None:
    async with RunningGateway(never) as running:
        body = {"inputs": "Hi", "parameters": {"details": True}}
        answer = asyncio.create_task(running.http.post("/generate", json=body))
        await until(lambda: running.router.submits)
        await running.router.die()
        async with running.restart_router():
            response = await answer
            assert response.json()["details"]["generated_tokens"] == 3
            assert len(response.json()["details"]["tokens"]) == 3


async def test_a_new_router_that_begins_too_early_repeats_nothing() -> None:
    async def first(conversation: fake.Conversation, submit: pb.Submit) -> None:
        conversation.send(submit, fake.accepted())
        both = fake.token(11, " Tokyo"), fake.token(12, " is")
        conversation.send(submit, fake.tokens(0, *both, text=" Tokyo is", offset=0))

    async def again(conversation: fake.Conversation, submit: pb.Submit) -> None:
        submit.ClearField("delivered")
        await fake.answer(conversation, submit)

    async with RunningGateway(first) as running:
        reader, writer = await running.raw("/generate_stream", {"inputs": "Hi"})
        await reader.readuntil(b" is")
        await running.router.die()
        async with running.restart_router(again):
            rest = await reader.readuntil(b'" Tokyo is big"')
            assert rest.count(b"data: ") == 1
        writer.close()


async def test_requests_wait_for_a_recovering_router_that_reports_loading() -> None:
    async with RunningGateway() as running:
        await running.router.die()
        await running.until_state(State.RECOVERING)
        router = running.restart_router()
        router.state = pb.SERVER_STATE_LOADING
        async with router:
            await until(lambda: router.conversations)
            task = asyncio.create_task(running.http.post("/generate", json={"inputs": "Hi"}))
            await asyncio.sleep(0.1)
            assert not router.submits
            router.last.send_state(pb.SERVER_STATE_READY)
            assert (await task).status_code == 200


async def test_requests_do_not_wait_for_ever() -> None:
    async with RunningGateway(never, router_timeout=0.1, keep_alive_seconds=0.2) as running:
        stream = asyncio.create_task(
            running.http.post("/v1/completions", json={"prompt": "a", "stream": True})
        )
        await until(lambda: running.gateway.services.housekeeper._writers)
        await running.router.die()
        await running.until_state(State.RECOVERING)
        response = await running.http.post("/generate", json={"inputs": "Hi"})
        assert response.status_code == 503
        assert response.json()["error_type"] == "unavailable"
        events = [e for e in events_of((await stream).text) if e != "[DONE]"]
        assert events[-1]["error_type"] == "unavailable"


async def test_no_more_wait_than_a_router_would_take() -> None:
    async with RunningGateway() as running:
        running.gateway.services.state.info.max_concurrent_requests = 2  # type: ignore[union-attr]
        await running.router.die()
        await running.until_state(State.RECOVERING)
        body = {"inputs": "Hi"}
        held = [asyncio.create_task(running.http.post("/generate", json=body)) for _ in range(2)]
        await until(lambda: len(running.gateway.services.client._calls) == 2)
        response = await running.http.post("/generate", json=body)
        assert (response.status_code, response.json()["error_type"]) == (429, "overloaded")
        assert "retry-after" in response.headers
        async with running.restart_router():
            assert [(await task).status_code for task in held] == [200, 200]


async def test_a_failed_server_answers_everybody() -> None:
    async with RunningGateway(silent) as running:
        waiting = asyncio.create_task(running.http.post("/generate", json={"inputs": "Hi"}))
        await until(lambda: running.router.submits)
        running.router.last.send_state(pb.SERVER_STATE_FAILED, "shard 0 keeps dying")
        response = await waiting
        assert response.status_code == 503
        assert response.json()["error"] == "shard 0 keeps dying"


async def test_a_stale_attempt_is_ignored() -> None:
    async def script(conversation: fake.Conversation, submit: pb.Submit) -> None:
        old = pb.Submit(key=submit.key, attempt=submit.attempt + 1)
        conversation.send(old, fake.error("generation", 424, "of another attempt"))
        await fake.answer(conversation, submit)

    async with RunningGateway(script) as running:
        response = await running.http.post("/generate", json={"inputs": "Hi"})
        assert response.status_code == 200
