"""Ways of decoding, on the embedded model: several answers, the best of several, beams, biases."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from headgate import Client
from tests.server.live_server import LiveServer
from tests.server.test_answers import PROMPTS

PROMPT = "Once upon a time, in a village by the sea,"
BAD_WORD = " king named"  # what follows greedily
SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 0.9, "max_new_tokens": 12}


def answers_of(answer: Any) -> list[Any]:
    """The tokens of all answers."""
    return [answer.tokens, *(other.tokens for other in answer.others)]


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


def test_a_prompt_is_scored_as_with_an_answer(server: LiveServer) -> None:
    scoring = {"prompt": PROMPT, "echo": True, "logprobs": 1, "max_tokens": 0}
    (choice,) = server.post("/v1/completions", scoring).json()["choices"]
    assert choice["text"] == PROMPT
    prefill = server.generate(PROMPT, max_new_tokens=1, decoder_input_details=True)["details"][
        "prefill"
    ]
    assert choice["logprobs"]["token_logprobs"] == [token["logprob"] for token in prefill]
    body = {"prompt": PROMPT, "prompt_logprobs": 1, "max_tokens": 1}
    (choice,) = server.post("/v1/completions", body).json()["choices"]
    shown = [
        entry and entry[str(t["id"])]
        for entry, t in zip(choice["prompt_logprobs"], prefill, strict=True)
    ]
    assert [entry and entry["logprob"] for entry in shown] == [t["logprob"] for t in prefill]


# ------------------------------------------------------------------ beams

BEAM_CASES: tuple[dict[str, Any], ...] = (
    {"beam_width": 4},
    {"beam_width": 3, "length_penalty": 0.5, "early_stopping": 1},
    {"beam_width": 2, "length_penalty": 2.0, "early_stopping": 2},
    {"beam_width": 5, "length_penalty": -0.5},
)
EARLY_STOPPING: tuple[bool | str, ...] = (False, True, "never")
BEAM_TIE = 2e-4  # of a score, which is up to 20 here: what the order of float32 sums may change


def reference_beams(model: Any, ids: list[int], case: dict[str, Any]) -> tuple[list[int], float]:
    """Transformers' best answer and its score."""
    found = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        num_beams=case["beam_width"],
        length_penalty=case.get("length_penalty", 1.0),
        early_stopping=EARLY_STOPPING[case.get("early_stopping", 0)],
        max_new_tokens=6,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        pad_token_id=0,
    )
    answer = found.sequences[0, len(ids) :].tolist()
    return answer, float(found.sequences_scores[0])


def reference_score(model: Any, ids: list[int], answer: list[int], case: dict[str, Any]) -> float:
    """Transformers' score of an answer that it did not choose."""
    logits = model(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1]
    chosen = torch.log_softmax(logits, -1).gather(1, torch.tensor(answer)[:, None])
    return float(chosen.sum()) / len(answer) ** case.get("length_penalty", 1.0)


def test_beams_are_transformers_beams(
    server: LiveServer, server_2_shards: LiveServer, reference: Any
) -> None:
    """20 prompts, a few of them on two shards too: the same tokens, but where the reference itself
    scores both answers within BEAM_TIE of each other."""
    with Client(server.grpc_address) as one, Client(server_2_shards.grpc_address) as two:
        for number, prompt in enumerate(PROMPTS):
            case = BEAM_CASES[number % len(BEAM_CASES)]
            ids = [span.id for span in one.tokenize(prompt)]
            theirs, score = reference_beams(reference, ids, case)
            for client in (one, two) if number < len(BEAM_CASES) else (one,):
                ours = client.generate(ids, **case, max_new_tokens=6)
                assert ours.score == pytest.approx(score, abs=BEAM_TIE), (number, case)
                tokens = [token.id for token in ours.tokens]
                if tokens != theirs[: len(tokens)]:
                    tied = reference_score(reference, ids, tokens, case)
                    assert tied == pytest.approx(score, abs=BEAM_TIE), (number, case)


def test_beams_are_the_same_in_a_crowd_and_on_two_shards(
    server: LiveServer, server_2_shards: LiveServer
) -> None:
    beams: dict[str, Any] = {"beam_width": 4, "n": 4, "max_new_tokens": 10}
    with Client(server.grpc_address) as client, Client(server_2_shards.grpc_address) as two:
        alone = client.generate(PROMPT, **beams)
        answers = [alone, *alone.others]
        assert len({answer.text for answer in answers}) == 4
        scores = [answer.score for answer in answers]
        assert scores == sorted(scores, reverse=True)
        with ThreadPoolExecutor(8) as pool:
            crowd = [
                pool.submit(client.generate, f"Number {i} is", **SAMPLED, seed=i, n=4)
                for i in range(7)
            ]
            again = pool.submit(client.generate, PROMPT, **beams).result()
            assert all(one.result() for one in crowd)
        assert (again.text, again.score) == (alone.text, alone.score)
        assert [other.text for other in again.others] == [other.text for other in alone.others]
        assert two.generate(PROMPT, **beams).score == pytest.approx(alone.score, abs=BEAM_TIE)
    body = {"prompt": PROMPT, "max_tokens": 10, "use_beam_search": True, "n": 4}
    choices = server.post("/v1/completions", body).json()["choices"]
    assert [choice["text"] for choice in choices] == [answer.text for answer in answers]


def test_bad_words(any_server: LiveServer) -> None:
    """A word of two tokens: the second does not follow the first, alone and in a crowd."""
    greedy: dict[str, Any] = {"max_new_tokens": 12}
    with Client(any_server.grpc_address) as client:
        plain = [token.id for token in client.generate(PROMPT, **greedy).tokens]
        word = [span.id for span in client.tokenize(BAD_WORD)]
        place = plain.index(word[0])
        assert plain[place : place + 2] == word

        def holds_the_word(tokens: Any) -> bool:
            ids = [token.id for token in tokens]
            return word in [ids[i : i + 2] for i in range(len(ids))]

        alone = client.generate(PROMPT, **greedy, bad_words=[BAD_WORD])
        ids = [token.id for token in alone.tokens]
        assert ids[: place + 1] == plain[: place + 1] and ids[place + 1] != plain[place + 1]
        assert not holds_the_word(alone.tokens)
        # Almost greedy, so that each of the four would say it.
        near: dict[str, Any] = {**SAMPLED, "temperature": 0.01, "seed": 1, "n": 4}
        assert all(map(holds_the_word, answers_of(client.generate(PROMPT, **near))))
        near["bad_words"] = [BAD_WORD.strip()]
        wanted = answers_of(client.generate(PROMPT, **near))
        assert not any(map(holds_the_word, wanted))
        with ThreadPoolExecutor(8) as pool:
            crowd = [
                pool.submit(client.generate, f"Number {i} is", **SAMPLED, seed=i, n=4)
                for i in range(7)
            ]
            again = pool.submit(client.generate, PROMPT, **near).result()
            assert all(one.result() for one in crowd)
        assert answers_of(again) == wanted
    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "bad_words": [BAD_WORD]}
    (choice,) = any_server.post("/v1/completions", body).json()["choices"]
    assert choice["text"] == alone.text
    assert any_server.post("/generate", body).json() == {"text": [PROMPT + alone.text]}


def test_logit_bias_and_allowed_tokens(server: LiveServer) -> None:
    greedy = {"temperature": 0, "max_tokens": 4, "prompt": PROMPT}
    first = server.token_ids(PROMPT, max_new_tokens=1)[0]
    plain = server.post("/v1/completions", greedy).json()["choices"][0]["text"]
    banned = server.post("/v1/completions", {**greedy, "logit_bias": {str(first): -100}})
    assert banned.json()["choices"][0]["text"] != plain
    with Client(server.grpc_address) as client:
        forced = client.generate(PROMPT, logit_bias={1234: 100.0}, max_new_tokens=3)
        assert [token.id for token in forced.tokens] == [1234] * 3
        assert forced.tokens[0].logprob is not None and forced.tokens[0].logprob < -1
        only = client.generate(PROMPT, **SAMPLED, seed=1, allowed_token_ids=[500, 600])
        assert {token.id for token in only.tokens} <= {500, 600}
