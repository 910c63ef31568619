"""A model with the Triton kernels and keys and values in 8 bits: the same answer in any company.

Interpreted float8 is rounded unlike torch's, so answers are compared with each other only; how near
a narrow cache's logits are to float32's is a test of the model runner.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

from headgate.proto.messages import RowSampling
from tests.parity.serving import Answer, Job, Server

GREEDY = RowSampling(max_new_tokens=2, logprobs=True, ignore_eos=True)
JOBS = [
    Job([*range(3, 23)], GREEDY),
    Job([*range(90, 83, -1)], replace(GREEDY, temperature=0.9, top_k=20, seed=5)),
]


def assert_same(answers: list[Answer], wanted: list[Answer]) -> None:
    for answer, other in zip(answers, wanted, strict=True):
        assert answer.token_ids == other.token_ids
        assert answer.logprobs == pytest.approx(other.logprobs, abs=1e-4)


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize(
    "kept", ["int8", "fp8_e4m3fn", pytest.param("fp8_e5m2", marks=pytest.mark.exhaustive)]
)
def test_answers_depend_on_the_request_alone(tiny_llama: Path, kept: str) -> None:
    server = Server(tiny_llama, kv_cache_dtype=kept, kernels="triton")
    alone = [server.serve([job])[0] for job in JOBS]
    server.limits(step_tokens=9)
    together = server.serve([*JOBS, JOBS[0]])  # in chunks, and one shares another's as it is made
    assert_same(together, [*alone, alone[0]])
    hits = server.scheduler.stats.prefix_hits
    assert_same(server.serve(JOBS[::-1])[::-1], alone)  # from the prefix cache
    assert server.scheduler.stats.prefix_hits > hits
