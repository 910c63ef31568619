"""What TGI's unit tests asserted of its parts, on the embedded model, on 1 and 2 shards.

Stop texts, alternatives, watermarks, text from tokens, rows that join and leave a batch, rules,
chat templates, Vertex AI's instances.
"""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer

from headgate.launcher.embedded_model import ensure_embedded_model
from headgate.shard.sampling.watermark import favoured_tokens
from tests.server.live_server import LiveServer
from tests.server.test_answers import check_against_reference
from tests.server.test_tgi_behaviour import QUESTION, at_once

# A text that the model is made to write, whatever it would say.
FORCED = "日本 a/test; b <|stop|> 🎉 end"
GRAMMAR = {"type": "regex", "value": re.escape(FORCED)}


@pytest.fixture(params=["server", "server_2_shards"])
def shards(request: pytest.FixtureRequest) -> LiveServer:
    """The embedded model on one shard, and on two."""
    live: LiveServer = request.getfixturevalue(request.param)
    return live


# ------------------------------------------------------------------ stopping criteria


def test_what_ends_an_answer(shards: LiveServer) -> None:
    """Stop texts are no patterns, may end inside tokens, and are searched in the answer only."""
    whole = shards.generate("Say: /test;", grammar=GRAMMAR)
    length = whole["details"]["generated_tokens"]
    cases: list[tuple[dict[str, Any], str, str]] = [
        ({"stop": ["/test;x", "<.stop.>", "Say"]}, FORCED, "eos_token"),
        ({"max_new_tokens": length}, FORCED, "eos_token"),
        ({"max_new_tokens": length - 1}, FORCED, "length"),
        ({"stop": ["/test;"]}, "日本 a/test;", "stop_sequence"),
        ({"stop": ["<|stop|>"]}, "日本 a/test; b <|stop|>", "stop_sequence"),
        ({"stop": ["end.", "es"]}, "日本 a/tes", "stop_sequence"),
        ({"stop": ["; b", "st; b"], "max_new_tokens": 8}, "日本 a/test; b", "stop_sequence"),
    ]
    answers = at_once(
        lambda case: shards.generate("Say: /test;", grammar=GRAMMAR, **case[0]), cases
    )
    for (parameters, text, reason), answer in zip(cases, answers, strict=True):
        assert (answer["generated_text"], answer["details"]["finish_reason"]) == (text, reason), (
            parameters
        )


def test_text_of_tokens_that_are_parts_of_characters(shards: LiveServer) -> None:
    events = list(shards.stream("Say: ", grammar=GRAMMAR))
    texts = [event["token"]["text"] for event in events if not event["token"]["special"]]
    assert "".join(texts) == events[-1]["generated_text"] == FORCED
    assert "" in texts and not any("\ufffd" in text for text in texts)
    cut = shards.generate("Say: ", grammar=GRAMMAR, max_new_tokens=1)  # inside the first one
    assert cut["generated_text"] == cut["details"]["tokens"][0]["text"] == "\ufffd"


# ---------------------------------------------------------------------------- sampling


def test_alternatives(shards: LiveServer) -> None:
    def ask(count: int) -> dict[str, Any]:
        return shards.generate("The sea is", max_new_tokens=3, top_n_tokens=count)["details"]

    none, *some = at_once(ask, (0, 2, 3, 5))
    assert "top_tokens" not in none
    for count, details in zip((2, 3, 5), some, strict=True):
        for place, best in enumerate(details["top_tokens"]):
            assert len(best) == count and best[0] == details["tokens"][place]
            logprobs = [token["logprob"] for token in best]
            assert logprobs == sorted(logprobs, reverse=True)
            assert best == some[-1]["top_tokens"][place][:count]


def test_a_watermark_is_found_by_who_knows_it(shards: LiveServer) -> None:
    config = json.loads((ensure_embedded_model() / "config.json").read_text())

    drawn = {"temperature": 1.5, "seed": 2}  # greedily the model has little choice

    def favoured(**parameters: Any) -> int:
        ids = shards.token_ids("Once upon a time", max_new_tokens=16, **drawn, **parameters)
        return sum(
            after in favoured_tokens(before, config["vocab_size"], 0.5)
            for before, after in pairwise(ids)
        )

    assert favoured(watermark=True) >= 12 > favoured()


# ----------------------------------------------------------------------------- batches


def test_rows_that_join_and_leave_change_nothing(shards: LiveServer, reference: Any) -> None:
    """Some end at once, some are abandoned by their clients."""
    asked = {"max_new_tokens": 24, "details": True}
    alone = shards.generate("Test", **asked)
    ids = [token["id"] for token in shards.post("/tokenize", {"inputs": "Test"}).json()]
    assert check_against_reference(reference, ids, alone["details"]["tokens"])

    def come_and_go(index: int) -> None:
        for event in shards.stream(f"{index} times", max_new_tokens=60, ignore_eos_token=True):
            if event["index"] > 2 * index:
                return  # which closes the connection

    with ThreadPoolExecutor(8) as pool:
        company = [pool.submit(come_and_go, index) for index in range(6)]
        crowded = pool.submit(shards.generate, "Test", **asked).result()
        for one in company:
            one.result()
    assert crowded == alone


# ------------------------------------------------------------------------------- rules


def test_rules(shards: LiveServer) -> None:
    limits = httpx.get(f"{shards.url}/info").json()
    longest = limits["max_total_tokens"]
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("", {}, "`inputs` cannot be empty"),
        ("Hi", {"best_of": 2}, "you must use sampling when `best_of` is > 1"),
        ("Hi", {"top_p": 0}, "`top_p` must be > 0.0 and < 1.0"),
        ("Hi", {"top_n_tokens": 6}, "`top_n_tokens` must be >= 0 and <= 5. Given: 6"),
        ("Hi", {"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
        (
            "Hi",
            {"max_new_tokens": longest},
            f"`inputs` tokens + `max_new_tokens` must be <= {longest}. "
            f"Given: 1 `inputs` tokens and {longest} `max_new_tokens`",
        ),
        (
            "a " * (longest - 1),
            {},
            f"`inputs` must have less than {limits['max_input_tokens']} tokens. Given: {longest}",
        ),
    ]
    for inputs, parameters, text in cases:
        refused = shards.post("/generate", {"inputs": inputs, "parameters": parameters})
        assert refused.status_code == 422
        assert refused.json()["error"] == f"Input validation error: {text}"


# ------------------------------------------------------------------------------- chats


def test_templates_are_rendered_as_by_transformers(shards: LiveServer) -> None:
    from transformers import PreTrainedTokenizerFast

    path = ensure_embedded_model()
    reference = PreTrainedTokenizerFast.from_pretrained(path)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    hello = {"role": "assistant", "content": "Hello! 🎉"}
    for messages in (
        QUESTION,
        [{"role": "system", "content": "Be brief."}, *QUESTION],
        [*QUESTION, hello, {"role": "user", "content": " and\nnow <|im_end|>?"}],
    ):
        answer = shards.post("/chat_tokenize", {"messages": messages}).json()
        text = reference.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert answer["templated_text"] == text
        ids = [token["id"] for token in answer["tokenize_response"]]
        assert ids == tokenizer.encode(text, add_special_tokens=False).ids
    parts = [
        {"type": "text", "text": "What is the capital "},
        {"type": "text", "text": "of Japan?"},
    ]
    joined, whole = (
        shards.post("/chat_tokenize", {"messages": [{"role": "user", "content": content}]}).json()
        for content in (parts, QUESTION[0]["content"])
    )
    assert joined == whole


def test_instances_of_vertex_ai_are_of_either_kind(shards: LiveServer) -> None:
    parameters = {"max_new_tokens": 6, "do_sample": True, "seed": 3}
    native = {"inputs": "The sea is", "parameters": parameters}
    chat = {"messages": QUESTION, "max_tokens": 6, "temperature": 0}
    predictions = shards.post("/vertex", {"instances": [chat, native, chat]}).json()["predictions"]
    answer = shards.post("/v1/chat/completions", chat).json()["choices"][0]["message"]["content"]
    text = shards.post("/generate", native).json()["generated_text"]
    assert predictions == [answer, text, answer]
    long = chat | {"max_tokens": 10**6}, native | {"parameters": {"max_new_tokens": 10**6}}
    for instance, field in zip(long, ("max_tokens", "max_new_tokens"), strict=True):
        refused = shards.post("/vertex", {"instances": [instance]})
        assert refused.status_code == 422 and f"`{field}`" in refused.json()["error"]
