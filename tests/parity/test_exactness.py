"""A request's answer does not depend on its company, its chunks, the caches or preemptions.

Only near ties may differ while matrix products round differently with the batch size:
a comparison ends after a position where the noise-free choice could have gone either way,
which the logprobs tell (they must agree to 1e-4).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from headgate.launcher.embedded_model import ensure_embedded_model
from headgate.proto.messages import RowSampling
from tests.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.parity.serving import BLOCK_SIZE, Answer, Job, Server

GREEDY = RowSampling(max_new_tokens=40, logprobs=True, ignore_eos=True)
SEEDED = replace(GREEDY, temperature=0.9, top_k=50, top_p=0.95, seed=1234)
PENALISED = replace(
    SEEDED,
    repetition_penalty=1.2,
    frequency_penalty=0.3,
    min_p=0.01,
    seed=77,
    bad_words=((5,), *((token, other) for token in range(100) for other in range(0, 100, 3))),
)
# Kinds of weights and of caches: the one that goes with them unless asked otherwise, and int8. The
# former's attention is of pairs, where heads have 16 dimensions.
QUANTISED = {"tiny llama in int8": ("int8", "int8"), "tiny llama in int4": ("int4", "bfloat16")}


@pytest.fixture(
    scope="module", params=["tiny llama", "tiny mistral with a window", "embedded", *QUANTISED]
)
def model(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def checkpoint(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if model == "embedded":
        return ensure_embedded_model()
    path = tmp_path_factory.mktemp("model")
    if "llama" in model:
        return make_checkpoint(path, "llama", head_dim=16 if "int4" in model else 8)
    return make_checkpoint(path, "mistral", sliding_window=20)


@pytest.fixture(scope="module")
def server(model: str, checkpoint: Path) -> Iterator[Server]:
    quantize, cache = QUANTISED.get(model, ("", "float32"))
    yield Server(checkpoint, quantize=quantize, kv_cache_dtype=cache)


def random_prompt(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(VOCAB_SIZE - 3) for _ in range(length)]


JOBS = [
    Job(random_prompt(1, 45), GREEDY),
    Job(random_prompt(2, 33), SEEDED),
    Job(random_prompt(3, 64), PENALISED),
]


@pytest.fixture(scope="module")
def alone(server: Server) -> list[Answer]:
    """Each job by itself, prompt in one piece, nothing cached."""
    answers = []
    for job in JOBS:
        server.limits()
        answers += server.serve([job])
    return answers


def assert_same(answers: list[Answer], expected: list[Answer]) -> None:
    for answer, wanted in zip(answers, expected, strict=True):
        assert answer.token_ids == wanted.token_ids
        assert answer.logprobs == pytest.approx(wanted.logprobs, abs=1e-4)


def company(count: int) -> list[Job]:
    rng = random.Random(9)
    return [
        Job(
            random_prompt(100 + i, rng.randrange(1, 60)), replace(SEEDED, seed=i, max_new_tokens=12)
        )
        for i in range(count)
    ]


def test_in_a_batch_of_32_others(server: Server, alone: list[Answer]) -> None:
    server.limits()
    assert_same(server.serve(JOBS + company(32))[: len(JOBS)], alone)
    server.limits()
    assert_same(server.serve(company(32) + JOBS)[-len(JOBS) :], alone)


def test_with_prompts_in_chunks_of_seven(server: Server, alone: list[Answer]) -> None:
    server.limits(step_tokens=7)
    assert_same(server.serve(JOBS), alone)


def test_from_the_prefix_cache(server: Server, alone: list[Answer]) -> None:
    """Each job twice: one step computes what the first has and uses it for the second. Then once
    more: answers have filled the blocks that prompts end in, of which halves are found too.
    """
    server.limits()
    answers = server.serve([*JOBS, *JOBS])
    assert answers[len(JOBS) :] == answers[: len(JOBS)]
    assert_same(answers[: len(JOBS)], alone)
    assert server.scheduler.stats.prefix_hits == shared(BLOCK_SIZE)
    assert_same(server.serve(JOBS), alone)
    halves = shared(BLOCK_SIZE // 2)
    assert halves > shared(BLOCK_SIZE)
    assert server.scheduler.stats.prefix_hits == shared(BLOCK_SIZE) + halves


def shared(part: int) -> int:
    """Tokens of the jobs' prompts but the last, in whole parts of so many."""
    return sum((len(job.prompt_ids) - 1) // part * part for job in JOBS)


def test_preempted_and_recomputed(server: Server, alone: list[Answer]) -> None:
    """Too little memory for what is admitted by a forecast that has seen short answers only."""
    server.limits(num_blocks=14, kv_overcommit=1.0)
    short = replace(GREEDY, max_new_tokens=1)
    server.serve([replace(job, sampling=short) for job in company(32)])
    assert_same(server.serve(JOBS + company(6))[: len(JOBS)], alone)
    assert server.scheduler.stats.preemptions > 0


def test_after_the_shards_were_lost(server: Server, alone: list[Answer]) -> None:
    """What recovery does: rows are sent again with the tokens so far."""
    server.limits()
    answers = server.serve(
        [
            replace(job, output_ids=answer.token_ids[:10])
            for job, answer in zip(JOBS, alone, strict=True)
        ]
    )
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in alone]
