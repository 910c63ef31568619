"""Many requests and little memory; clients that leave or do not read; too many requests."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.server.live_server import LiveServer, launched

USED_BLOCKS = "tgi_kv_cache_used_blocks"


@pytest.fixture(scope="module")
def small(tiny_checkpoint: Path) -> Iterator[LiveServer]:
    """A tiny model with KV memory for about an eighth of 64 concurrent requests."""
    with launched(
        "--model-id", str(tiny_checkpoint),
        "--max-total-tokens", "512",
        "--max-batch-total-tokens", "1024",
        "--max-batch-prefill-tokens", "256",
        "--max-concurrent-requests", "64",
        "--kv-overcommit", "1.0",
    ) as live:  # fmt: skip
        yield live
    assert "KV accounting balances" in live.log


def test_two_hundred_requests_with_memory_for_an_eighth_of_them(small: LiveServer) -> None:
    rng = random.Random(7)
    jobs = [
        ("word " * rng.choice((4, 20, 40)) + str(i), rng.choice((24, 48, 160, 300)))
        for i in range(200)
    ]

    def run(job: tuple[str, int]) -> tuple[int, str]:
        response = small.post(
            "/v1/completions",
            {"prompt": job[0], "max_tokens": job[1], "ignore_eos": True, "temperature": 0},
        )
        assert response.status_code == 200, response.text
        answer = response.json()
        return answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]

    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(run, jobs))
    assert answers == [(length, "length") for _, length in jobs]
    metrics = small.metrics()
    assert metrics["tgi_request_preemptions"] > 0
    assert metrics[USED_BLOCKS] == 0


def test_a_client_that_leaves_in_mid_stream_frees_its_blocks(server: LiveServer) -> None:
    stream = server.stream("go on", max_new_tokens=480, ignore_eos_token=True)
    next(stream)
    assert server.metrics()[USED_BLOCKS] > 0
    stream.close()
    assert server.wait_metric(USED_BLOCKS, 0, timeout=5) < 1.0


def test_a_client_that_leaves_in_mid_prompt_frees_its_blocks(server: LiveServer) -> None:
    """A prompt of several chunks on the embedded model; the connection closes before any token."""
    body = {"inputs": "one two three " * 1200, "parameters": {"max_new_tokens": 200}}
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        _send(connection, server, "/generate", body)
        deadline = time.monotonic() + 10
        while server.metrics()[USED_BLOCKS] == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert server.wait_metric(USED_BLOCKS, 0, timeout=5) < 1.0


def _send(connection: socket.socket, server: LiveServer, path: str, body: dict) -> None:
    request = httpx.Request("POST", server.url + path, json=body)
    head = f"POST {path} HTTP/1.1\r\n" + "".join(
        f"{name}: {value}\r\n" for name, value in request.headers.items()
    )
    connection.sendall(head.encode() + b"\r\n" + request.content)


def test_a_client_that_reads_nothing_stalls_nobody(small: LiveServer) -> None:
    body = {
        "inputs": "x",
        "parameters": {"max_new_tokens": 480, "ignore_eos_token": True, "top_n_tokens": 5},
    }
    connections = []
    for _ in range(4):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", small.port))
        _send(connection, small, "/generate_stream", body)
        connections.append(connection)
    for _ in range(5):
        assert small.generate("hello", max_new_tokens=8)["details"]["generated_tokens"] == 8
    for connection in connections:
        connection.close()
    small.wait_metric(USED_BLOCKS, 0, timeout=10)


def test_above_the_limit_429_at_once_and_the_others_unharmed(small: LiveServer) -> None:
    barrier = threading.Barrier(80)
    # One client for all: each would take 30 ms to make, and the requests are to meet.
    client = httpx.Client(base_url=small.url, timeout=120, limits=httpx.Limits(max_connections=80))

    def run(index: int) -> tuple[int, float, httpx.Headers]:
        barrier.wait()
        start = time.monotonic()
        parameters = {"max_new_tokens": 480, "ignore_eos_token": True}
        body = {"inputs": f"{index}", "parameters": parameters}
        response = client.post("/generate", json=body)
        return response.status_code, time.monotonic() - start, response.headers

    with client, ThreadPoolExecutor(80) as pool:
        answers = list(pool.map(run, range(80)))
    statuses = [status for status, _, _ in answers]
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= 64
    slowest_answer = max(seconds for status, seconds, _ in answers if status == 200)
    for status, seconds, headers in answers:
        if status == 429:
            assert int(headers["retry-after"]) >= 1
            assert seconds < slowest_answer / 2, "it waited for others"
    assert small.metrics()['tgi_request_failure{err="overloaded"}'] == statuses.count(429)


def test_health_answers_in_milliseconds_under_load(server: LiveServer) -> None:
    with ThreadPoolExecutor(8) as pool:
        work = [
            pool.submit(server.generate, "tell me more " * 60 + str(i), max_new_tokens=32)
            for i in range(8)
        ]
        times = []
        with httpx.Client() as client:
            while not all(future.done() for future in work):
                start = time.perf_counter()
                assert client.get(f"{server.url}/health").status_code == 200
                times.append(time.perf_counter() - start)
                time.sleep(0.02)
        for future in work:
            future.result()
    times.sort()
    assert times[len(times) // 2] < 0.05
