"""The benchmark's own code: the workload, what is read out of replies, the page it writes."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

import headgate.bench.__main__ as bench
from headgate.bench import client
from headgate.bench.contestants import Contestant
from headgate.bench.plot import throughput_chart
from headgate.bench.processes import cpu_used, usage
from headgate.bench.report import render
from headgate.bench.results import Run, Session, spread
from headgate.bench.roofline import measure
from headgate.bench.scheduling import step_milliseconds
from headgate.bench.steps import gaps, read_trace
from headgate.bench.streams import StreamFailed, Streams
from headgate.bench.workload import BenchRequest, make_requests, make_warm_up
from headgate.launcher.model_files import ModelFiles
from headgate.proto.messages import RowSampling, StepPlan
from headgate.router.kv_cache_manager import KVCacheManager
from headgate.router.request import Request
from headgate.shard.step_trace import StepTrace
from tests.unit.tokenizers_for_tests import byte_level

TOKENIZER = byte_level()


def lengths(requests: list[BenchRequest]) -> list[tuple[int, int]]:
    return [(request.prompt_tokens, request.output_tokens) for request in requests]


def test_lengths_come_from_one_seed_and_words_from_both() -> None:
    first = make_requests("default", 20, 1, 0, TOKENIZER)
    assert first == make_requests("default", 20, 1, 0, TOKENIZER)
    other = make_requests("default", 20, 1, 5, TOKENIZER)
    assert lengths(first) == lengths(other)
    assert not {request.prompt for request in first} & {request.prompt for request in other}
    assert lengths(first) != lengths(make_requests("default", 20, 2, 0, TOKENIZER))
    for request in first:
        assert len(TOKENIZER.encode(request.prompt).ids) == request.prompt_tokens
        assert 16 <= request.prompt_tokens <= 600 and 32 <= request.output_tokens <= 128


def test_shared_prefix_and_warm_up() -> None:
    requests = make_requests("shared-prefix", 4, 1, 0, TOKENIZER)
    prompts = [request.prompt for request in requests]
    prefix = TOKENIZER.decode(TOKENIZER.encode(prompts[0]).ids[:590])
    assert all(prompt.startswith(prefix) for prompt in prompts)
    assert len(set(prompts)) == 4
    warm_up = make_warm_up(3, 1, 0, TOKENIZER)
    assert all(request.output_tokens == 16 for request in warm_up)
    assert not {request.prompt for request in warm_up} & set(prompts)


def reply_of(body: bytes, size: int, chunk: int) -> client.Reply:
    """A reply that came in blocks of `size` bytes, one a second, in chunks of `chunk`."""
    chunks = [body[start : start + chunk] for start in range(0, len(body), chunk)]
    framed = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in chunks) + b"0\r\n\r\n"
    raw = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + framed
    blocks = [raw[start : start + size] for start in range(0, len(raw), size)]
    stamped = [(float(number), block) for number, block in enumerate(blocks)]
    return client._taken_apart(0.0, float(len(blocks)), stamped, BenchRequest("x", 5, 3))


@pytest.mark.parametrize("size", [1, 7, 64, 10_000])
@pytest.mark.parametrize("chunk", [3, 50, 10_000])
def test_events_are_found_and_timed_wherever_blocks_and_chunks_end(size: int, chunk: int) -> None:
    events = [{"choices": [{"text": text, "finish_reason": None}]} for text in ("a", "", "c")]
    events += [{"choices": [{"text": "", "finish_reason": "length"}]}]
    events += [{"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}]
    lines = [b"data: %s\n\n" % json.dumps(event).encode() for event in events]
    reply = reply_of(b": comment\n\n" + b"".join(lines) + b"data: [DONE]\n\n", size, chunk)
    assert (reply.error, reply.prompt_tokens, reply.output_tokens) == ("", 7, 3)
    assert len(reply.token_times) == 3
    assert list(reply.token_times) == sorted(reply.token_times)
    if size == 1:  # then times are offsets: an event's is that of the end of its line
        gap = reply.token_times[1] - reply.token_times[0]
        assert gap >= len(lines[1])


def test_what_is_no_answer_is_an_error() -> None:
    refused = [(0.0, b"HTTP/1.1 429 Too Many\r\n\r\n{}")]
    assert "429" in client._taken_apart(0.0, 1.0, refused, BenchRequest("x", 5, 3)).error
    assert "no token" in reply_of(b"data: [DONE]\n\n", 9, 9).error
    assert "broken" in reply_of(b'data: {"error": "broken"}\n\n', 9, 9).error


def test_percentiles_lie_between_neighbours() -> None:
    assert client.percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert client.percentile([1.0, 2.0], 0.9) == pytest.approx(1.9)
    assert client.percentile([], 0.5) == 0.0


ROOF = {
    "threads": 2,
    "fma_gflops": 60.0,
    "bf16_gflops": 120.0,
    "vnni_gops": 300.0,
    "memory_gb_s": 20.0,
    "small_pages_gb_s": 12.5,
    "core_to_core_ns": 50.0,
}


@pytest.mark.parametrize("threads", [1, 2])
def test_the_machine_is_measured(threads: int) -> None:
    found = measure(threads)
    assert found.threads == threads
    assert min(found.fma_gflops, found.memory_gb_s, found.small_pages_gb_s) > 0
    assert (found.core_to_core_ns > 0) == (threads > 1)


def run(server: str, kind: str, concurrency: int, number: int, rate: float) -> Run:
    result = client.RunResult(rate, 1.0, 10.0, 50.0, 90.0, 20.0, 30.0, 1000, 500, 0, "", 0.1)
    peak = {"shard": 1 << 30}
    after = ROOF | {"memory_gb_s": 20.0 + 20.0 * number}  # the machine changes
    return Run(
        server=server,
        kind=kind,
        workload="default",
        concurrency=concurrency,
        requests=8,
        round=number,
        ready_seconds=3.0,
        cpu_seconds={"shard": 9.0},
        peak_bytes=peak,
        result=asdict(result),
        rooflines=[ROOF, after],
    )


def test_the_page_has_medians_shares_and_ratios(tmp_path: Path) -> None:
    machine = {"cpu": "a chip", "cores": 2, "memory_gib": 8, "version": "1", "when": "today"}
    model = {"name": "m", "parameters": 1e8, "prompt_flops": 2e8, "output_flops": 2e8}
    session = Session(machine | {"command": "make bench"}, model)
    for number, rate in enumerate((90.0, 100.0, 120.0)):
        session.runs.append(run("Headgate", "bf16", 1, number, rate))
        session.runs.append(run("Headgate", "bf16", 32, number, rate))
        session.runs.append(run("Headgate", "bf16-medium", 32, number, 2 * rate))
        session.runs.append(run("Other <1>", "bf16", 32, number, rate / 2))
    session.save(tmp_path / "runs.jsonl")
    assert Session.load(tmp_path / "runs.jsonl") == session
    page = render(session, "here")
    assert "(here.jsonl)" in page and "(here.svg)" in page
    assert "| default | 1 | Headgate | 100.0 | 30.0% | 50.0 / 90.0 | 20.0 / 30.0 |" in page
    assert "| default | 32 | bf16 | Other <1> bf16 | 2.00 | 1.00 |" in page
    assert "| default | 32 | bf16-medium | Other <1> bf16 | 4.00 | 1.00 |" in page
    # 1500 tokens of 0.2 GFLOP in 10 s are 30 GFLOP/s; 0.2 GB in 20 ms are 10 GB/s, of 20, 30 and
    # 60 that memory gave in the rounds.
    assert "| Headgate bf16 | 32 | fp32 FMA | 30 GFLOP/s | 50% |" in page
    assert "| Headgate bf16 | 1 | memory bandwidth, decoding | 10.0 GB/s | 25% (80% of what" in page
    assert "| Headgate bf16 | shard 0.90 | 1.00 | 3.0 |" in page
    assert len(ET.fromstring(throughput_chart(session)).findall(".//*[@fill-opacity]")) == 4
    assert spread([1.0]) == 0.0


def test_a_session_goes_on_where_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rounds of two servers: after the first call, by time; a run with errors is made again."""
    measured: list[tuple[str, int]] = []
    errors = iter([0, 3, 0, 0, 0])

    def measure(server: Contestant, plan: Any, number: int, *_: Any) -> list[Run]:
        measured.append((server.name, number))
        made = run(server.name, server.kind, 1, number, 10.0)
        return [replace(made, result=made.result | {"errors": next(errors)})]

    servers = [Contestant(name, "bf16", lambda port: []) for name in ("Headgate", "Other")]
    model = {"name": "m", "parameters": 1e8, "prompt_flops": 2e8, "output_flops": 2e8}
    monkeypatch.setattr(bench, "_measure", measure)
    monkeypatch.setattr(bench, "_contestants", lambda *_: servers)
    monkeypatch.setattr(bench, "_model", lambda _: model)
    files = ModelFiles(str(tmp_path), "m")
    monkeypatch.setattr(bench, "prepare_model", lambda _: (files, TOKENIZER))
    words = ["bench", "--runs", "2", "--plan", "default:1:8", "--output", str(tmp_path / "out")]

    def call(*more: str) -> list[tuple[str, int]]:
        measured.clear()
        monkeypatch.setattr(sys, "argv", words + list(more))
        assert bench.main() == 0
        return list(measured)

    assert call("--runs", "1") == [("Headgate", 0), ("Other", 0)]
    assert call("--resume", "--minutes", "1e-9") == []
    assert call("--resume") == [("Other", 0), ("Headgate", 1), ("Other", 1)]
    assert call("--resume") == []
    session = Session.load(tmp_path / "out.jsonl")
    assert [(one.server, one.round) for one in session.runs] == [
        ("Headgate", 0),
        ("Other", 0),
        ("Headgate", 1),
        ("Other", 1),
    ]
    assert "| rounds | 2 |" in (tmp_path / "out.md").read_text()
    monkeypatch.setattr(bench, "_model", lambda _: model | {"name": "another"})
    with pytest.raises(SystemExit, match="is of the model m"):
        call("--resume")
    (tmp_path / "out.jsonl").write_text('{"machine": {}, "model": {}, "roofline": []}\n')
    with pytest.raises(SystemExit, match="was written by another version"):
        call("--resume")


def test_gaps_between_decode_steps_are_read_from_a_trace(tmp_path: Path) -> None:
    trace = StepTrace.from_environment({"HEADGATE_STEP_TRACE": str(tmp_path / "trace")}, 1)
    assert trace is not None and StepTrace.from_environment({}, 0) is None
    times = [(0, 10), (12, 20), (23, 30), (90, 100), (101, 110)]
    for sequence, (began, ended) in enumerate(times, start=1):
        counts = [5, 1] if sequence == 3 else [1, 1]
        trace.note(StepPlan(1, sequence, rows=(1, 2), counts=counts), began, ended)
    trace.close()
    with (tmp_path / "trace.1").open("a") as file:
        file.write("6 2 2 11")  # the process was killed
    steps = read_trace(tmp_path / "trace.1")
    assert len(steps) == 5
    assert list(gaps(steps, rows=2)) == [(2, 8), (1, 9)]
    assert list(gaps(steps, rows=3)) == []


def test_processes_are_counted_by_role() -> None:
    before = usage(os.getpid())
    sum(number * number for number in range(2_000_000))
    spent = cpu_used(before, usage(os.getpid()))
    assert 0.02 < spent["other"] < 30
    assert before["other"].peak_bytes > 10_000_000


@contextlib.contextmanager
def answering(answer: bytes) -> Iterator[str]:
    """The address of a server that gives every request this answer."""

    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while connection.recv(65536):
                connection.sendall(answer)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


def test_the_stream_client_counts_whole_answers_and_refuses_others() -> None:
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    events = b'e\r\ndata: {"a":1}\n\n\r\n' * 5
    with answering(head + events + b"0\r\n\r\n") as url:
        streams = Streams(url, 3, {"prompt": "x"}, tokens=5)
        tokens, answers = streams.run(0.2)
        streams.close()
        assert answers >= 3 and answers * 5 <= tokens < (answers + 3) * 5
        with pytest.raises(StreamFailed, match="5 events"):
            Streams(url, 1, {"prompt": "x"}, tokens=6).run(0.2)
    with (
        answering(b"HTTP/1.1 429 Too Many\r\n\r\n") as url,
        pytest.raises(StreamFailed, match="429"),
    ):
        Streams(url, 1, {}, 1).run(0.2)


def test_a_large_prefix_cache_asks_no_more_questions_than_a_small_one() -> None:
    """Counts dictionary look-ups rather than time."""

    class Counting(dict[bytes, int]):
        asked = 0

        def get(self, key: bytes, default: int | None = None) -> int | None:  # type: ignore[override]
            type(self).asked += 1
            return super().get(key, default)

    asked = []
    for blocks in (10, 100_000):
        kv = KVCacheManager(blocks, 1)
        cached = Request(1, range(blocks + 1), RowSampling(max_new_tokens=1))
        kv.admit(cached, [], blocks)
        cached.num_confirmed = blocks
        kv.publish(cached)
        kv._cache._blocks = Counting(kv._cache._blocks)
        Counting.asked = 0
        hits = kv.match(Request(2, [*range(8), 7_000_000, 3], RowSampling(max_new_tokens=1)))
        assert len(hits) == 8
        asked.append(Counting.asked)
    assert asked == [9, 9]


def test_the_scheduler_alone_can_be_timed() -> None:
    assert 0 < step_milliseconds(8, rounds=20) < 1000
