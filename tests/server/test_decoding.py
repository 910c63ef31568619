"""Ways of decoding, on the embedded model: several answers to a prompt, the best of several."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from headgate import Client
from tests.server.live_server import LiveServer

PROMPT = "Once upon a time, in a village by the sea,"
SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 0.9, "max_new_tokens": 12}


@pytest.fixture(params=["server", "server_2_shards"])
def any_server(request: pytest.FixtureRequest) -> LiveServer:
    return request.getfixturevalue(request.param)


def test_each_answer_is_the_same_alone_and_in_a_crowd(any_server: LiveServer) -> None:
    """Four answers of one seed, by themselves and among 32 other rows; the first one, alone."""
    with Client(any_server.grpc_address) as client:
        alone = client.generate(PROMPT, **SAMPLED, seed=7, n=4)
        texts = [alone.text, *(other.text for other in alone.others)]
        assert len(set(texts)) == 4
        assert client.generate(PROMPT, **SAMPLED, seed=7).text == texts[0]
        with ThreadPoolExecutor(8) as pool:
            crowd = [
                pool.submit(client.generate, f"Number {i} is", **SAMPLED, seed=i, n=4)
                for i in range(7)
            ]
            again = pool.submit(client.generate, PROMPT, **SAMPLED, seed=7, n=4).result()
            assert all(len(one.result().others) == 3 for one in crowd)
        assert [again.text, *(other.text for other in again.others)] == texts


def test_the_best_of_several(server: LiveServer) -> None:
    with Client(server.grpc_address) as client:
        all_ = client.generate(PROMPT, **SAMPLED, seed=3, n=2)
        best = client.generate(PROMPT, **SAMPLED, seed=3, best_of=2)

    def mean(answer: Any) -> float:
        return sum(token.logprob for token in answer.tokens) / len(answer.tokens)

    assert best.text == max((all_, *all_.others), key=mean).text
    parameters = {**SAMPLED, "best_of": 2, "details": True}
    details = server.generate(PROMPT, **parameters)["details"]
    (other,) = details["best_of_sequences"]
    assert sum(t["logprob"] for t in details["tokens"]) / len(details["tokens"]) >= sum(
        t["logprob"] for t in other["tokens"]
    ) / len(other["tokens"])


def test_choices_over_http(server: LiveServer) -> None:
    body = {"prompt": [PROMPT, "Water boils at"], "n": 2, "seed": 5, "max_tokens": 8}
    choices = server.post("/v1/completions", body).json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert len({choice["text"] for choice in choices}) == 4
    one = server.post("/v1/completions", {**body, "prompt": PROMPT, "n": 1}).json()["choices"][0]
    assert one["text"] == choices[0]["text"]
