"""What all routes share: health, keys, CORS, ids, bodies, error shapes, warnings."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import pytest

from headgate.router.gateway.server_state import State
from tests.unit import fake_router as fake
from tests.unit.fake_router import pb
from tests.unit.running_gateway import RunningGateway, until

GENERATE = {"inputs": "Hi"}


async def status_of(running: RunningGateway, path: str) -> int:
    return (await running.http.get(path)).status_code


async def health(running: RunningGateway) -> list[int]:
    paths = ("/health/live", "/health/ready", "/health", "/ping", "/")
    return [await status_of(running, path) for path in paths]


async def test_before_there_is_a_router() -> None:
    async with RunningGateway(router=False) as running:
        running.status_path.write_text('{"phase": "downloading", "detail": "40 of 94 MB"}')
        assert await health(running) == [200, 503, 503, 503, 503]
        ready = (await running.http.get("/health/ready")).json()
        assert ready == {
            "error": "unhealthy",
            "error_type": "healthcheck",
            "state": "loading",
            "detail": "downloading: 40 of 94 MB",
        }
        response = await running.http.post("/generate", json=GENERATE)
        assert response.status_code == 503
        assert response.json()["error_type"] == "unavailable"
        assert "40 of 94 MB" in response.json()["error"]
        assert int(response.headers["retry-after"]) >= 1
        for path in ("/info", "/v1/models", "/metrics"):
            assert await status_of(running, path) == 503
        chat = await running.http.post("/v1/chat/completions", json={"messages": []})
        assert chat.status_code == 503
        assert chat.json()["error"]["type"] == "server_error"


async def test_a_new_gateway_beside_a_server_that_was_ready() -> None:
    async with RunningGateway(router=False) as running:
        running.status_path.write_text('{"phase": "recovering"}')
        assert await health(running) == [200, 503, 200, 200, 200]
        await asyncio.sleep(0.3)  # status.json is read a few times a second
        running.status_path.write_text('{"phase": "failed", "detail": "shard 1 keeps dying"}')
        await running.until_state(State.FAILED)
        assert (await health(running))[1:] == [503] * 4
        response = await running.http.post("/generate", json=GENERATE)
        assert response.json()["error"] == "shard 1 keeps dying"


async def test_health_follows_the_router() -> None:
    async with RunningGateway() as running:
        assert await health(running) == [200] * 5
        assert (await running.http.get("/health/ready")).json() == {"state": "ready"}
        assert (await running.http.get("/health")).content == b""
        for state, expected in (
            (pb.SERVER_STATE_RECOVERING, [200, 503, 200, 200, 200]),
            (pb.SERVER_STATE_LOADING, [200, 503, 200, 200, 200]),  # loading again: a recovery
            (pb.SERVER_STATE_DRAINING, [200, 503, 200, 200, 200]),
            (pb.SERVER_STATE_FAILED, [200, 503, 503, 503, 503]),
        ):
            running.router.last.send_state(state, "why")
            proto = running.gateway.services.state
            await until(lambda s=state, p=proto: p._status is not None and p._status.state == s)  # type: ignore[misc]
            assert await health(running) == expected
        response = await running.http.post("/generate", json=GENERATE)
        assert (response.status_code, response.json()["error"]) == (503, "why")


async def test_loading_router_is_not_healthy_yet() -> None:
    async with RunningGateway(router=False) as running:
        running.router.state = pb.SERVER_STATE_LOADING
        async with running.router:
            await until(lambda: running.gateway.services.state.info)
            assert (await health(running))[1:] == [503] * 4
            running.router.last.send_state(pb.SERVER_STATE_READY)
            await running.until_state(State.READY)
            assert await health(running) == [200] * 5


async def test_draining_refuses() -> None:
    async with RunningGateway() as running:
        running.router.last.send_state(pb.SERVER_STATE_DRAINING)
        await running.until_state(State.DRAINING)
        response = await running.http.post("/generate", json=GENERATE)
        assert (response.status_code, response.json()["error_type"]) == (503, "draining")
        assert "retry-after" in response.headers


async def test_info_and_metrics() -> None:
    async with RunningGateway() as running:
        info = (await running.http.get("/info")).json()
        tgi = {
            "model_id": "org/model",
            "model_sha": None,
            "model_pipeline_tag": "text-generation",
            "max_concurrent_requests": 128,
            "max_best_of": 2,
            "max_stop_sequences": 4,
            "max_input_tokens": 100,
            "max_total_tokens": 200,
            "validation_workers": 2,
            "max_client_batch_size": 4,
            "version": "0.1.0",
            "sha": None,
            "docker_label": None,
        }
        assert tgi.items() <= info.items()
        assert info["dtype"] == "bfloat16" and info["state"] == "ready"
        metrics = await running.http.get("/metrics")
        assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
        assert "tgi_queue_size 0" in metrics.text


async def test_api_key() -> None:
    async with RunningGateway(api_key="Secret") as running:
        posts = [route.path for route in running.gateway.routes if "POST" in (route.methods or ())]
        assert {"/generate", "/v1/chat/completions", "/tokenize", "/cancel"} <= set(posts)
        for path in posts:
            for header in (None, "Secret", "Bearer secret", "Bearer", "Basic Secret", "Bearer é"):
                headers = {"authorization": header.encode("latin-1")} if header else {}
                response = await running.http.post(path, json={}, headers=headers)  # type: ignore[arg-type]
                assert response.status_code == 401, (path, header)
                assert response.json()["error_type"] == "unauthorized"
                assert response.headers["x-request-id"]
        for header in ("Bearer Secret", "bearer Secret", "BEARER  Secret"):
            headers = {"authorization": header}
            response = await running.http.post("/generate", json=GENERATE, headers=headers)
            assert response.status_code == 200
        for path in ("/", "/health", "/health/live", "/health/ready", "/ping", "/metrics", "/info"):
            assert await status_of(running, path) == 200
        assert await status_of(running, "/v1/models") == 200


async def test_cors() -> None:
    async with RunningGateway() as running:
        preflight = await running.http.options(
            "/generate",
            headers={
                "origin": "http://page",
                "access-control-request-method": "POST",
                "access-control-request-headers": "authorization,content-type",
            },
        )
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "*"
        assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
        answer = await running.http.post("/generate", json={}, headers={"origin": "http://page"})
        assert answer.status_code == 422
        assert answer.headers["access-control-allow-origin"] == "*"
        assert "x-request-id" in answer.headers["access-control-expose-headers"]
    async with RunningGateway(cors_allow_origin=("http://mine",)) as running:
        for origin, allowed in (("http://mine", "http://mine"), ("http://other", None)):
            answer = await running.http.get("/health", headers={"origin": origin})
            assert answer.headers.get("access-control-allow-origin") == allowed


async def test_request_ids() -> None:
    async with RunningGateway() as running:
        ids = [
            (await running.http.get(path)).headers["x-request-id"]
            for path in ("/health", "/health", "/nowhere")
        ]
        assert len(set(ids)) == 3
        given = await running.http.get("/health", headers={"x-request-id": "abc-1"})
        assert given.headers["x-request-id"] == "abc-1"
        for bad in ("x" * 129, "tab\there"):
            answer = await running.http.get("/health", headers={"x-request-id": bad})
            assert answer.headers["x-request-id"] not in (bad, "")


async def test_unknown_routes_and_methods() -> None:
    async with RunningGateway() as running:
        for method, path, status, error_type in (
            ("GET", "/nowhere", 404, "not_found"),
            ("POST", "/generate/", 404, "not_found"),
            ("GET", "/generate", 405, "method_not_allowed"),
            ("DELETE", "/", 405, "method_not_allowed"),
            ("POST", "/health", 405, "method_not_allowed"),
        ):
            response = await running.http.request(method, path)
            assert response.status_code == status, path
            assert response.json()["error_type"] == error_type
            assert set(response.json()) == {"error", "error_type"}
        response = await running.http.get("/v1/chat/completions")
        assert response.status_code == 405
        assert response.headers["allow"] == "POST"
        assert response.json()["error"]["code"] == "method_not_allowed"


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
async def test_bodies_that_cannot_be_read(path: str) -> None:
    async with RunningGateway() as running:
        json_type = {"content-type": "application/json"}
        form_type = {"content-type": "application/x-www-form-urlencoded"}
        cases: list[tuple[bytes, dict[str, str], int, str]] = [
            (b'{"inputs": "Hi"', json_type, 400, "malformed"),
            (b"", json_type, 400, "malformed"),
            (b'{"inputs": "\xff"}', json_type, 400, "malformed"),
            (b'{"inputs": "\\ud800"}', json_type, 400, "malformed"),
            (b'{"inputs": NaN}', {}, 400, "malformed"),
            (b'{"inputs": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", {}, 400, "malformed"),
            (b"inputs=Hi", form_type, 415, "unsupported_media_type"),
            (b"[]", json_type, 422, "validation"),
            (b'"text"', json_type, 422, "validation"),
            (b"{}", json_type, 422, "validation"),
            (b'{"inputs": 3, "prompt": 3}', json_type, 422, "validation"),
        ]
        for body, headers, status, error_type in cases:
            response = await running.http.post(path, content=body, headers=headers)
            assert response.status_code == status, body
            assert response.json()["error_type"] == error_type
        missing = await running.http.post("/generate", json={})
        assert missing.json()["error"] == "Input validation error: missing field `inputs`"


async def test_json_is_taken_under_any_content_type() -> None:
    async with RunningGateway() as running:
        for content_type in (None, "application/x-www-form-urlencoded", "text/plain"):
            headers = {"content-type": content_type} if content_type else {}
            body = json.dumps(GENERATE).encode()
            response = await running.http.post("/generate", content=body, headers=headers)
            assert response.status_code == 200


async def test_payload_limit() -> None:
    async with RunningGateway(payload_limit=1000) as running:

        async def chunks():  # type: ignore[no-untyped-def]
            for _ in range(300):
                yield b"x" * 10

        for content in (b"x" * 1001, chunks()):
            response = await running.http.post("/generate", content=content)
            assert response.status_code == 413
            assert response.json()["error_type"] == "payload_too_large"
            assert "1000" in response.json()["error"]
        ok = json.dumps({"inputs": "x" * 980}).encode()
        assert len(ok) <= 1000
        assert (await running.http.post("/generate", content=ok)).status_code == 200


async def test_unknown_fields_are_told(caplog: pytest.LogCaptureFixture) -> None:
    body: dict[str, Any] = {**GENERATE, "foo": 1, "parameters": {"b\r\nar": 2, "é": 3}}
    with caplog.at_level(logging.INFO, "headgate"):
        async with RunningGateway() as running:
            response = await running.http.post("/generate", json=body)
            assert response.status_code == 200
            expected = "unknown fields ignored: foo, parameters.b??ar, parameters.?"
            assert response.headers["x-headgate-warnings"] == expected
            streamed = await running.http.post("/generate_stream", json=body)
            assert streamed.headers["x-headgate-warnings"] == expected
    assert len([r for r in caplog.records if r.message == "unknown fields ignored"]) == 2
    async with RunningGateway(strict=True) as running:
        response = await running.http.post("/generate", json=body)
        assert response.status_code == 422
        assert response.json()["error"] == "Input validation error: unknown field `foo`"


async def test_fields_of_messages_are_told_and_nulls_are_absent() -> None:
    message = {"role": "user", "content": "Hi", "refusal": None, "weight": 1}
    body: dict[str, Any] = {"messages": [message], "prediction": None}
    async with RunningGateway(strict=True) as running:
        response = await running.http.post("/v1/chat/completions", json=body)
        assert response.status_code == 422
        assert response.json()["error"]["param"] == "messages[0].weight"
        del message["weight"]
        assert (await running.http.post("/v1/chat/completions", json=body)).status_code == 200


async def test_refusals_by_the_gateway_are_logged_and_counted_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def overloaded(conversation: fake.Conversation, submit: pb.Submit) -> None:
        error = fake.error("overloaded", 429, "Model is overloaded", retry_after=2.5)
        conversation.send(submit, error)

    with caplog.at_level(logging.INFO, "headgate"):
        async with RunningGateway(overloaded) as running:
            await running.http.post("/generate", json={}, headers={"x-request-id": "r1"})
            for path in ("/generate", "/generate_stream"):
                response = await running.http.post(path, json=GENERATE)
                assert response.status_code == 429
                assert response.headers["retry-after"] == "3"
                assert response.json() == {
                    "error": "Model is overloaded",
                    "error_type": "overloaded",
                }
            await until(lambda: running.router.last.got("failure"))
            (failure,) = running.router.last.got("failure")
            assert failure.failure.error_type == "validation"
    (refused,) = [record for record in caplog.records if record.message == "request refused"]
    assert refused.fields["request_id"] == "r1"  # type: ignore[attr-defined]
    assert refused.fields["http_status"] == 422  # type: ignore[attr-defined]


async def test_a_fault_of_the_gateway_is_a_500_and_not_its_end() -> None:
    async with RunningGateway() as running:
        running.gateway.services.client.submit = None  # type: ignore[assignment,method-assign]
        response = await running.http.post("/generate", json=GENERATE)
        assert response.status_code == 500
        assert response.json()["error_type"] == "internal"
        assert await status_of(running, "/health") == 200


async def test_requests_share_a_connection() -> None:
    async with RunningGateway() as running:
        reader, writer = await running.raw("/generate", GENERATE)
        for _ in range(3):
            head = await reader.readuntil(b"\r\n\r\n")
            assert b"200 OK" in head
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            assert json.loads(await reader.readexactly(length))["generated_text"]
            writer.write(
                b'POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 15\r\n\r\n{"inputs": "a"}'
            )
            await asyncio.sleep(0)
        writer.close()


async def exchange(running: RunningGateway, data: bytes) -> bytes:
    """What comes back for raw bytes until the server closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
    writer.write(data)
    received = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    return received


async def test_old_and_odd_http() -> None:
    body = b'{"inputs": "a", "stream": true}'
    post = b"POST / HTTP/1.%%d\r\nhost: x\r\nconnection: close%%s\r\ncontent-length: %d\r\n" % len(
        body
    )
    async with RunningGateway(payload_limit=1000) as running:
        streamed = await exchange(running, post % (0, b"") + b"\r\n" + body)
        assert b"chunked" not in streamed
        assert streamed.partition(b"\r\n\r\n")[2].count(b"data: ") == 3
        assert streamed.endswith(b"}\n\n")
        offer = b", Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABk\r\nUpgrade: h2c"
        upgraded = await exchange(running, post % (1, offer) + b"\r\n" + body)
        assert upgraded.startswith(b"HTTP/1.1 200") and upgraded.endswith(b"0\r\n\r\n")
        for data in (b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nx: " + b"y" * 70_000):
            refused = await exchange(running, data)
            assert refused.startswith(b"HTTP/1.1 400") and b"x-request-id: " in refused
            assert b'"error_type":"malformed"' in refused
        refused = await exchange(
            running,
            b"POST / HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 2000\r\n\r\n",
        )
        assert refused.startswith(b"HTTP/1.1 413") and b"connection: close" in refused
