"""Shards that die or hang in mid-stream: the stream goes on with the very same tokens."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

import httpx
import psutil
import pytest

from tests.server.live_server import LiveServer, launched, sse_events

GREEDY = {"max_new_tokens": 60}
SAMPLED = {"max_new_tokens": 60, "do_sample": True, "temperature": 0.8, "top_p": 0.95, "seed": 5}
CONSTRAINED = {
    **SAMPLED,
    "grammar": {"type": "regex", "value": "([a-z]+[ ,])+"},
    "ignore_eos_token": True,
}
PROMPT = "Once upon a time there was a"


@pytest.fixture(scope="module")
def pair() -> Iterator[LiveServer]:
    """The embedded model on two shards, with a short patience for hung ones."""
    with launched("--num-shard", "2", "--heartbeat-timeout", "3") as live:
        yield live


class Streaming(threading.Thread):
    """Collects a stream's tokens; `started` is set after the first few."""

    def __init__(self, server: LiveServer, parameters: dict) -> None:
        super().__init__(daemon=True)
        self.server, self.parameters = server, parameters
        self.ids: list[int] = []
        self.text = ""
        self.final: dict = {}
        self.started = threading.Event()

    def run(self) -> None:
        for event in self.server.stream(PROMPT, **self.parameters):
            assert "error" not in event, event
            self.ids.append(event["token"]["id"])
            self.text += event["token"]["text"]
            self.final = event
            if len(self.ids) == 4:
                self.started.set()


class StreamingChoices(threading.Thread):
    """Collects the texts of two choices; `started` is set when both have some."""

    BODY: ClassVar[dict] = {
        "prompt": PROMPT,
        "max_tokens": 60,
        "n": 2,
        "seed": 9,
        "ignore_eos": True,
    }

    def __init__(self, server: LiveServer) -> None:
        super().__init__(daemon=True)
        self.server = server
        self.texts = ["", ""]
        self.started = threading.Event()

    def run(self) -> None:
        url = f"{self.server.url}/v1/completions"
        with httpx.stream("POST", url, json={**self.BODY, "stream": True}, timeout=120) as response:
            for event in sse_events(response):
                for choice in event["choices"]:
                    self.texts[choice["index"]] += choice["text"]
                if all(len(text) > 10 for text in self.texts):
                    self.started.set()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("rank", [0, 1])
def test_streams_go_on_after_a_shard_is_lost(
    pair: LiveServer, rank: int, how: signal.Signals
) -> None:
    kinds = (GREEDY, SAMPLED if rank else CONSTRAINED)
    expected = [pair.token_ids(PROMPT, **p) for p in kinds]
    recoveries = pair.metrics()["tgi_group_recoveries"]
    streams = [Streaming(pair, p) for p in kinds]
    for stream in streams:
        stream.start()
    for stream in streams:
        assert stream.started.wait(60)
    pair.shard(rank).send_signal(how)
    health = []
    while any(stream.is_alive() for stream in streams):
        health.append(httpx.get(f"{pair.url}/health", timeout=5).status_code)
        time.sleep(0.05)
    assert set(health) == {200}
    for stream, ids in zip(streams, expected, strict=True):
        assert stream.ids == ids
        assert stream.final["generated_text"] == stream.text
        assert stream.final["details"]["generated_tokens"] == 60
    assert pair.metrics()["tgi_group_recoveries"] == recoveries + 1
    assert pair.wait_metric("tgi_kv_cache_used_blocks", 0, timeout=5) < 5


def test_the_router_is_restarted_and_streams_go_on(pair: LiveServer) -> None:
    expected = pair.token_ids(PROMPT, **CONSTRAINED)
    whole = pair.post("/v1/completions", StreamingChoices.BODY).json()["choices"]
    stream, choices = Streaming(pair, CONSTRAINED), StreamingChoices(pair)
    stream.start()
    choices.start()
    assert stream.started.wait(60) and choices.started.wait(60)
    for process in pair.processes("headgate.router"):
        process.kill()
    stream.join(60)
    choices.join(60)
    assert stream.ids == expected
    assert stream.final["generated_text"] == stream.text
    assert choices.texts == [choice["text"] for choice in whole]


def test_a_group_that_keeps_dying_ends_the_launcher(tiny_checkpoint: Path) -> None:
    """Each new shard is killed as soon as it is seen; waiting clients get a 503."""
    live = LiveServer("--model-id", str(tiny_checkpoint))
    live.wait_ready()
    answers: list[int] = []

    def ask() -> None:
        response = live.post("/generate", {"inputs": "x", "parameters": {"max_new_tokens": 400}})
        answers.append(response.status_code)

    client = threading.Thread(target=ask, daemon=True)
    live.shard(0).send_signal(signal.SIGKILL)
    client.start()
    deadline = time.monotonic() + 120
    while live.process.poll() is None:
        assert time.monotonic() < deadline, live.log
        with suppress(AssertionError, psutil.NoSuchProcess):  # none is there at the moment
            live.shard(0).send_signal(signal.SIGKILL)
        time.sleep(0.1)
    assert live.wait_exit() != 0
    client.join(10)
    assert answers == [503]
    assert "SIGKILL" in live.log


def test_a_stop_lets_running_requests_finish(tiny_checkpoint: Path) -> None:
    live = LiveServer("--model-id", str(tiny_checkpoint)).wait_ready()
    stream = Streaming(live, {"max_new_tokens": 400, "do_sample": True, "seed": 3})
    stream.start()
    assert stream.started.wait(30)
    assert live.stop() == 0
    stream.join(5)
    assert stream.final["details"]["generated_tokens"] == len(stream.ids)
    assert stream.final["generated_text"] is not None


def test_two_servers_started_at_once_do_not_meet(tiny_checkpoint: Path) -> None:
    first = LiveServer("--model-id", str(tiny_checkpoint))
    second = LiveServer("--model-id", str(tiny_checkpoint), "--num-shard", "2")
    with first, second:
        first.wait_ready()
        second.wait_ready()
        assert first.token_ids("abc", max_new_tokens=16) == second.token_ids(
            "abc", max_new_tokens=16
        )
        first.shard(0).send_signal(signal.SIGKILL)
        assert len(second.token_ids("abc", max_new_tokens=16)) == 16
        assert len(first.token_ids("abc", max_new_tokens=16)) == 16
