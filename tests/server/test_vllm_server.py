"""vLLM's server, by its command line, its clients of two generations and its quick start."""

from __future__ import annotations

import json
import subprocess
from itertools import pairwise
from pathlib import Path

import httpx

from tests.server.live_server import LiveServer, launched

START = "San Francisco is a"


def test_quick_start_by_curl(server: LiveServer) -> None:
    body = json.dumps({"prompt": START, "max_tokens": 7, "temperature": 0})
    done = subprocess.run(
        ["curl", "--silent", f"{server.url}/generate", "-d", body],
        capture_output=True,
        text=True,
        timeout=60,
    )
    (text,) = json.loads(done.stdout)["text"]
    same = server.generate(START, max_new_tokens=7)["generated_text"]
    assert text == START + same


def test_streams_are_cumulative(server: LiveServer) -> None:
    body = {"prompt": START, "temperature": 0, "stream": True, "use_beam_search": False}
    whole = server.post("/generate", {**body, "stream": False}).json()["text"][0]
    with httpx.stream("POST", f"{server.url}/generate", json=body, timeout=60) as response:
        texts = [json.loads(line)["text"][0] for line in response.iter_lines() if line]
    assert len(texts) == 16 and texts[-1] == whole
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))


def test_command_line_and_clients_that_split_at_nul(tiny_checkpoint: Path) -> None:
    with launched(
        *("--max-model-len", "0.4k", "--max-num-seqs", "8", "--vllm-stream-delimiter", "nul"),
        *("--swap-space", "4"),
        command=("headgate.entrypoints.api_server",),
        env={"MODEL_NAME": str(tiny_checkpoint)},
    ) as live:
        assert "--swap-space has no effect" in live.log
        info = httpx.get(f"{live.url}/info").json()
        assert (info["max_total_tokens"], info["max_batch_size"]) == (400, 8)
        assert httpx.get(f"{live.url}/health").status_code == 200
        body = {"prompt": "a", "stream": True, "max_tokens": 3, "ignore_eos": True}
        pieces = live.post("/generate", body).content.split(b"\0")
        assert [list(json.loads(piece)) for piece in pieces if piece] == [["text"]] * 3
