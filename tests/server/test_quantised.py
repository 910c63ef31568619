"""A quantised model with quantised keys and values, served by two shards."""

from __future__ import annotations

import httpx

from tests.server.live_server import launched


def test_int8_on_two_shards_answers_and_says_so() -> None:
    flags = ("--quantize", "int8", "--kv-cache-dtype", "int8", "--num-shard", "2")
    with launched(*flags) as live:
        assert "steps are replayed" in live.log
        answer = live.generate("The capital of Japan is", max_new_tokens=4)
        assert answer["generated_text"].startswith(" Tokyo")
        assert httpx.get(f"{live.url}/info", timeout=30).json()["quantize"] == "int8"
