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


HALVES = "--kv-cache-dtype float16"  # the interpreter cuts bfloat16 numbers off


@pytest.mark.parametrize(
    "chosen",
    [
        "--num-shard 2",
        pytest.param("--num-shard 1", marks=pytest.mark.exhaustive),
        pytest.param(f"--num-shard 1 --quantize int8 {HALVES}", marks=pytest.mark.exhaustive),
        pytest.param(
            f"--num-shard 2 --quantize int8-weight-only {HALVES}", marks=pytest.mark.exhaustive
        ),
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


def prompt_logprobs(server: LiveServer) -> list[float]:
    """Of all prompts' tokens but the first: given, so that one difference leads to no other."""
    found: list[float] = []
    for prompt in PROMPTS:
        details = server.generate(prompt, max_new_tokens=1, decoder_input_details=True)["details"]
        found += [token["logprob"] for token in details["prefill"][1:]]
    return found


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("chosen", "other", "bound"),  # of the mean difference of a prompt token's logprob
    [
        # Numbers halfway between two whole ones may go to either.
        ("--num-shard 2 --kv-cache-dtype int8", "--num-shard 1 --kv-cache-dtype int8", 0.01),
        ("--num-shard 1 --kv-cache-dtype int8", "--num-shard 1", 0.06),
        ("--num-shard 1 --kv-cache-dtype fp8_e4m3fn", "--num-shard 1", 0.7),
        # Of int4 the reference rounds inputs to 8 bits.
        (
            f"--num-shard 2 --quantize int4 {HALVES}",
            f"--num-shard 2 --quantize int4 {HALVES}",
            0.12,
        ),
    ],
)
def test_a_server_that_rounds_otherwise_is_near_the_reference(
    tiny_llama: Path, chosen: str, other: str, bound: float
) -> None:
    flags = ("--model-id", str(tiny_llama), *FLAGS)
    with launched(*flags, *other.split(), "--kernels", "reference") as server:
        wanted = prompt_logprobs(server)
    env = {"TRITON_INTERPRET": "1"}
    with launched(*flags, *chosen.split(), "--kernels", "triton", env=env) as server:
        got = prompt_logprobs(server)
        assert answers(server) == answers(server)  # the second time from the prefix cache
    assert len(got) > 20
    apart = [abs(ours - theirs) for ours, theirs in zip(got, wanted, strict=True)]
    assert sum(apart) / len(apart) < bound
