"""What programs written for vLLM's servers ask, by the openai client: /v1 and /generate."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import openai

CAPITAL = "The capital of France is"
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Tokyo", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}


def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0)


def complete(url: str, max_tokens: int = 4, **extra: Any) -> Any:
    given = {"model": "tgi", "prompt": CAPITAL, "temperature": 0, "max_tokens": max_tokens}
    return client(url).completions.create(**given, extra_body=extra).choices


def generate(url: str, **more: Any) -> Any:
    body = {"prompt": CAPITAL, "temperature": 0, "max_tokens": 4, **more}
    return client(url).post("../generate", body=body, cast_to=object)["text"]


def row_guided(url: str) -> None:
    def ask(**extra: Any) -> str:
        return str(complete(url, 32, **extra)[0].text)

    assert json.loads(ask(guided_json=CITY))["city"] in ("Tokyo", "Oslo")
    assert ask(guided_json_object=True).lstrip().startswith("{")
    assert re.fullmatch("[ab]{2}", ask(guided_regex="[ab]{2}"))
    assert ask(guided_choice=["yes", "no"]) in ("yes", "no")
    assert re.fullmatch(r"\d;", ask(guided_grammar='root ::= [0-9] ";"'))


def row_structured_outputs(url: str) -> None:
    for wish, form in (({"choice": ["yes", "no"]}, "yes|no"), ({"regex": "[ab]{2}"}, "[ab]{2}")):
        (answer,) = complete(url, 32, structured_outputs=wish)
        assert re.fullmatch(form, answer.text)
        (text,) = generate(url, max_tokens=32, structured_outputs=wish)
        assert text == CAPITAL + answer.text
        assert generate(url, max_tokens=32, guided_decoding=wish) == [text]


def row_tokens_and_words(url: str) -> None:
    (plain,) = complete(url)
    assert "Paris" in plain.text
    for wish in ({"bad_words": ["Paris"]}, {"allowed_token_ids": [500, 600]}):
        (other,) = complete(url, **wish)
        assert "Paris" not in other.text
        assert generate(url, **wish) == [CAPITAL + other.text]
    tokens = client(url).post("../tokenize", body={"inputs": " Paris"}, cast_to=object)
    assert "Paris" not in generate(url, logit_bias={str(tokens[0]["id"]): -200})[0]


def row_prompt_logprobs_and_top_n(url: str) -> None:
    (choice,) = complete(url, 1, prompt_logprobs=2, top_n=3, add_special_tokens=False)
    assert len(choice.prompt_logprobs) == 5 and choice.prompt_logprobs[0] is None
    assert len(choice.logprobs.top_logprobs[0]) == 3


def row_beam_search(url: str) -> None:
    beams = {"use_beam_search": True, "best_of": 3, "length_penalty": 0.5, "early_stopping": True}
    texts = [choice.text for choice in complete(url, n=2, **beams)]
    assert len(set(texts)) == 2
    assert generate(url, n=2, **beams) == [CAPITAL + text for text in texts]


def row_sampling(url: str) -> None:
    given = {
        "temperature": 0.8, "top_p": 0.9, "top_k": 20, "min_p": 0.01, "seed": 4, "n": 2,
        "presence_penalty": 0.1, "frequency_penalty": 0.1, "repetition_penalty": 1.1,
    }  # fmt: skip
    texts = generate(url, **given)
    assert len(texts) == 2 and texts == generate(url, **given)


def row_lengths_and_ends(url: str) -> None:
    (whole,) = generate(url, max_tokens=8, min_tokens=8, ignore_eos=True, detokenize=True)
    stop = whole[len(CAPITAL) :][2:5]
    (stopped,) = generate(url, max_tokens=8, stop=[stop], skip_special_tokens=True)
    assert stopped == whole[: whole.index(stop, len(CAPITAL))]
    (included,) = generate(url, max_tokens=8, stop=stop, include_stop_str_in_output=True)
    assert included == stopped + stop
    assert generate(url, stop_token_ids=[0], truncate_prompt_tokens=2)[0].startswith(CAPITAL)


def row_fields_that_are_refused(url: str) -> None:
    for fields in (
        {"logits_processors": ["x"]}, {"logprob_token_ids": [1]}, {"flat_logprobs": True},
        {"spaces_between_special_tokens": False}, {"thinking_token_budget": 3},
        {"repetition_detection": {"a": 1}}, {"extra_args": {"a": 1}}, {"max_tokens": 10**6},
        {"best_of": 10**6},
    ):  # fmt: skip
        (name,) = fields
        try:
            generate(url, **fields)
        except openai.UnprocessableEntityError as error:
            assert f"`{name}`" in error.response.json()["error"], error.response.text
        else:
            raise AssertionError(f"{name} is taken")


def row_fields_without_effect(url: str) -> None:
    body = {"prompt": CAPITAL, "max_tokens": 1, "logprobs": 1, "prompt_logprobs": 1}
    text = httpx.post(f"{url}/generate", json=body).headers["x-headgate-warnings"]
    assert "`logprobs`" in text and "`prompt_logprobs`" in text
