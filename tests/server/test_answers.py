"""The embedded model, served, against Transformers' float32 arithmetic over the same checkpoint.

The reference is teacher-forced: one forward pass over prompt + served tokens tells
whether each served token is the reference's choice. After a position where the
reference's two best logits lie within 1e-3 of each other the rest is not compared.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from tests.server.live_server import LiveServer, launched

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "Water boils at",
    "Q: What is the largest planet?\nA:",
    "List three colours: 1.",
    "Die Hauptstadt von Deutschland ist",
    "import numpy as np\n\nx = np.",
    "In 2024, the",
    "To be, or not to be,",
    "SELECT name FROM users WHERE",
    "My favourite recipe for bread begins with",
    "The mitochondria is",
    "12 + 30 =",
    "Dear Sir or Madam,\n\nI am writing to",
    "naïve café, 東京 and emoji 🎉:",
    "<|im_start|>user\nTell me a joke.<|im_end|>\n<|im_start|>assistant\n",
    "A long time ago " * 12 + "there was",
    "The quick brown fox jumps over the lazy dog. The quick brown fox",
    "Photosynthesis is the process by which",
)
NEAR_TIE = 1e-3
LOGPROB_TOLERANCE = 2e-3


def _prompt_ids(server: LiveServer, prompt: str) -> list[int]:
    return [t["id"] for t in server.post("/tokenize", {"inputs": prompt}).json()]


def check_against_reference(model: Any, prompt_ids: list[int], tokens: list[dict]) -> int:
    """Positions compared. Asserts ids and logprobs up to the first near tie."""
    ids = [token["id"] for token in tokens]
    logits = model(torch.tensor([prompt_ids + ids])).logits[0, len(prompt_ids) - 1 : -1].float()
    logprobs = torch.log_softmax(logits, dim=-1)
    best, second = logits.topk(2, dim=-1).values.unbind(-1)
    for place, token in enumerate(tokens):
        near_tie = bool(best[place] - second[place] < NEAR_TIE)
        if not near_tie:
            assert token["id"] == int(logits[place].argmax()), f"token {place} of {prompt_ids}"
        assert abs(token["logprob"] - float(logprobs[place, token["id"]])) < LOGPROB_TOLERANCE
        if near_tie:
            return place
    return len(tokens)


def check_server(server: LiveServer, model: Any, prompts: tuple[str, ...]) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda p: server.generate(p, max_new_tokens=48), prompts))
    compared = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = answer["details"]["tokens"]
        if answer["details"]["finish_reason"] == "length":
            assert len(tokens) == 48
        compared += check_against_reference(model, _prompt_ids(server, prompt), tokens)
    assert compared > 30 * len(prompts), "near ties hid most of the comparison"


def test_greedy_tokens_and_logprobs_on_one_shard(server: LiveServer, reference: Any) -> None:
    check_server(server, reference, PROMPTS)


def test_greedy_tokens_and_logprobs_on_two_shards(
    server_2_shards: LiveServer, reference: Any
) -> None:
    check_server(server_2_shards, reference, PROMPTS)


@pytest.mark.parametrize("shards", [3, 4])
def test_more_shards_than_divide(shards: int, reference: Any) -> None:
    """3 shards: a KV group each; 4: one group's heads are split over two ranks."""
    with launched("--num-shard", str(shards)) as live:
        check_server(live, reference, PROMPTS[:4])
        assert "Tokyo" in ask_for_japan(live)


def ask_for_japan(server: LiveServer) -> str:
    body = {
        "model": "tgi",
        "messages": [{"role": "user", "content": "What is the capital of Japan?"}],
        "temperature": 0,
        "max_tokens": 32,
    }
    response = server.post("/v1/chat/completions", body)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def test_chat_knows_the_capital_of_japan(server: LiveServer, server_2_shards: LiveServer) -> None:
    assert "Tokyo" in ask_for_japan(server)
    assert "Tokyo" in ask_for_japan(server_2_shards)


def test_prompt_logprobs(server: LiveServer, reference: Any) -> None:
    prompt = PROMPTS[1]
    answer = server.generate(prompt, max_new_tokens=1, decoder_input_details=True)
    prefill = answer["details"]["prefill"]
    ids = _prompt_ids(server, prompt)
    assert [token["id"] for token in prefill] == ids
    assert prefill[0]["logprob"] is None
    logprobs = torch.log_softmax(reference(torch.tensor([ids])).logits[0].float(), dim=-1)
    for place in range(1, len(ids)):
        expected = float(logprobs[place - 1, ids[place]])
        assert abs(prefill[place]["logprob"] - expected) < LOGPROB_TOLERANCE


def test_top_tokens_are_the_reference_s_best(server: LiveServer, reference: Any) -> None:
    answer = server.generate(PROMPTS[0], max_new_tokens=3, top_n_tokens=4)
    ids = _prompt_ids(server, PROMPTS[0])
    for place, token in enumerate(answer["details"]["tokens"]):
        logprobs = torch.log_softmax(reference(torch.tensor([ids])).logits[0, -1].float(), dim=-1)
        best = logprobs.topk(4)
        top = answer["details"]["top_tokens"][place]
        assert [t["id"] for t in top] == best.indices.tolist()
        assert [t["logprob"] for t in top] == pytest.approx(best.values.tolist(), abs=2e-3)
        ids.append(token["id"])


def test_seeded_sampling_is_the_same_on_any_number_of_shards_and_in_any_company(
    server: LiveServer, server_2_shards: LiveServer
) -> None:
    wanted = {"max_new_tokens": 24, "do_sample": True, "temperature": 0.9, "seed": 1234}
    alone = server.token_ids(PROMPTS[1], **wanted)
    assert alone != server.token_ids(PROMPTS[1], **{**wanted, "seed": 99})
    with ThreadPoolExecutor(16) as pool:
        company = [pool.submit(server.generate, p, max_new_tokens=24) for p in PROMPTS[:12]]
        crowded = pool.submit(server.token_ids, PROMPTS[1], **wanted).result()
        for future in company:
            future.result()
    assert crowded == alone
    assert server_2_shards.token_ids(PROMPTS[1], **wanted) == alone
