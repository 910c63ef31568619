"""The launcher with `--kernels triton`, under the interpreter, gives the reference's tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.server.live_server import LiveServer, launched

PROMPTS = ("a", "zwölf Boxkämpfer jagen Viktor über den Deich")  # the second takes two chunks
FLAGS = ("--max-total-tokens", "128", "--max-batch-prefill-tokens", "32", "--dtype", "float32")


SAMPLED = {"do_sample": True, "seed": 7, "temperature": 0.8, "top_k": 20}


def answers(server: LiveServer) -> list[list[int]]:
    """Token ids of greedy and of seeded sampled answers."""
    return [
        server.token_ids(prompt, max_new_tokens=4, **sampling)
        for prompt in PROMPTS
        for sampling in ({}, SAMPLED)
    ]


@pytest.mark.parametrize(
    "chosen",
    [
        "--num-shard 2",
        pytest.param("--num-shard 1", marks=pytest.mark.exhaustive),
        pytest.param("--num-shard 1 --quantize int8", marks=pytest.mark.exhaustive),
        pytest.param("--num-shard 2 --quantize int4", marks=pytest.mark.exhaustive),
    ],
)
def test_a_server_gives_the_reference_s_tokens(tiny_llama: Path, chosen: str) -> None:
    flags = ("--model-id", str(tiny_llama), *chosen.split(), *FLAGS)
    with launched(*flags, "--kernels", "reference") as server:
        wanted = answers(server)
    ours = ("--kernels", "triton", "--batch-invariant")
    with launched(*flags, *ours, env={"TRITON_INTERPRET": "1"}) as server:
        assert "kernels=triton" in server.log
        got = answers(server)
    assert got == wanted
    assert all(wanted)
