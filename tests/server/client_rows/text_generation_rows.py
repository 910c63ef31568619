"""text-generation, TGI's own old client: whole answers, streams, chat, asyncio, errors.

Its chat streams want a field that neither TGI nor OpenAI sends, and cannot read `[DONE]`: no row.
"""

from __future__ import annotations

import asyncio

from text_generation import AsyncClient, Client
from text_generation.errors import ValidationError

CAPITAL = "The capital of France is"
QUESTION = [{"role": "user", "content": "What is the capital of Japan?"}]


def row_generate(url: str) -> None:
    answer = Client(url).generate(CAPITAL, max_new_tokens=8, decoder_input_details=True)
    assert "Paris" in answer.generated_text
    assert answer.details.generated_tokens == 8 and len(answer.details.prefill) == 5, answer
    assert answer.details.finish_reason == "length"


def row_stream(url: str) -> None:
    answer = Client(url).generate(CAPITAL, max_new_tokens=8)
    streamed = list(Client(url).generate_stream(CAPITAL, max_new_tokens=8))
    assert "".join(event.token.text for event in streamed) == answer.generated_text
    assert streamed[-1].generated_text == answer.generated_text


def row_sampling(url: str) -> None:
    given = {
        "do_sample": True, "seed": 3, "temperature": 0.8, "top_k": 20, "top_p": 0.9,
        "typical_p": 0.9, "repetition_penalty": 1.1, "frequency_penalty": 0.1,
        "watermark": True, "max_new_tokens": 4,
    }  # fmt: skip
    first = Client(url).generate("Hello", **given)
    assert first.details.seed == 3
    assert Client(url).generate("Hello", **given).generated_text == first.generated_text


def row_best_of(url: str) -> None:
    answer = Client(url).generate("Hello", max_new_tokens=4, do_sample=True, best_of=2)
    assert len(answer.details.best_of_sequences) == 1


def row_stop_and_full_text(url: str) -> None:
    answer = Client(url).generate(
        CAPITAL, max_new_tokens=20, stop_sequences=["Paris"], return_full_text=True
    )
    assert answer.generated_text.startswith(CAPITAL)
    assert answer.generated_text.endswith("Paris")
    assert answer.details.finish_reason == "stop_sequence"


def row_alternatives_and_truncation(url: str) -> None:
    answer = Client(url).generate(CAPITAL, max_new_tokens=2, top_n_tokens=2, truncate=3)
    assert [len(place) for place in answer.details.top_tokens] == [2, 2]


def row_grammar(url: str) -> None:
    from text_generation.types import Grammar, GrammarType

    grammar = Grammar(type=GrammarType.Regex, value="(Rome|Oslo)")
    answer = Client(url).generate("A city: ", max_new_tokens=8, grammar=grammar)
    assert answer.generated_text in ("Rome", "Oslo")


def row_chat(url: str) -> None:
    answer = Client(url).chat(QUESTION, max_tokens=32, temperature=0.0, seed=1)
    assert "Tokyo" in answer.choices[0].message.content


def row_async(url: str) -> None:
    answer = asyncio.run(AsyncClient(url).generate(CAPITAL, max_new_tokens=8))
    assert "Paris" in answer.generated_text


def row_errors(url: str) -> None:
    for change in ({"max_new_tokens": 10**6}, {"truncate": 10**6}):
        try:
            Client(url).generate("Hello", **change)
        except ValidationError as error:
            assert next(iter(change)) in str(error)
            continue
        raise AssertionError("no ValidationError")
