"""Tokens to text events: what is released when, how an answer ends, how it is taken up again."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from headgate.proto import router_pb2
from headgate.proto.messages import PromptLogprobs, RowEnd, TopTokens
from headgate.router.detokenizer import Pieces
from headgate.router.output_processor import Answer, OutputProcessor
from headgate.router.request import Request
from headgate.router.row_output import RowOutput
from headgate.router.tokenizer import Tokenizer
from headgate.router.validation import Validator, ValidRequest
from tests.unit import tokenizers_for_tests as made
from tests.unit.test_validation import CONFIG

BACKEND = made.byte_level()
PIECES = Pieces.of(BACKEND)
VALIDATOR = Validator(CONFIG, Tokenizer(BACKEND, workers=1))
END = BACKEND.token_to_id(made.SPECIAL)
LENGTH = router_pb2.FINISH_REASON_LENGTH
EOS = router_pb2.FINISH_REASON_EOS_TOKEN
STOP = router_pb2.FINISH_REASON_STOP_SEQUENCE


def valid(**parameters: Any) -> ValidRequest:
    message = router_pb2.GenerateRequest(text="x", parameters=router_pb2.Parameters(**parameters))
    return asyncio.run(VALIDATOR.validate(message))


def ids_of(text: str) -> list[int]:
    return BACKEND.encode(text, add_special_tokens=False).ids


def run(
    text: str, last: RowEnd = RowEnd.LENGTH, extra: tuple[int, ...] = (), **parameters: Any
) -> tuple[Answer, list[Any]]:
    """Pushes the ids of `text` and `extra`, the last with `last`, until the answer ends."""
    answer = Answer(valid(**parameters), PIECES)
    outcomes = []
    ids = [*ids_of(text), *extra]
    for place, id_ in enumerate(ids, start=1):
        outcomes.append(answer.push(id_, -0.5, None, last if place == len(ids) else RowEnd.NONE))
        if outcomes[-1].reason:
            break
    return answer, outcomes


def texts(outcomes: list[Any]) -> list[str]:
    return [outcome.tokens.text for outcome in outcomes]


def check_offsets(outcomes: list[Any]) -> None:
    offset = 0
    for index, outcome in enumerate(outcomes):
        assert outcome.tokens.text_offset == offset
        assert outcome.tokens.first_index == index
        offset += len(outcome.tokens.text)


def test_text_and_offsets_count_characters() -> None:
    answer, outcomes = run("a😀é")
    assert "".join(texts(outcomes)) == answer.text == "a😀é"
    check_offsets(outcomes)
    assert outcomes[-1].reason == LENGTH
    assert outcomes[0].tokens.tokens[0].logprob == pytest.approx(-0.5)


def test_an_end_inside_a_character_is_flushed_into_the_last_event() -> None:
    answer = Answer(valid(), PIECES)
    ids = ids_of("a😀")[:-1]
    outcomes = [answer.push(id_) for id_ in ids[:-1]]
    outcomes.append(answer.push(ids[-1], end=RowEnd.LENGTH))
    assert answer.text == "a\ufffd"
    assert outcomes[-1].tokens.tokens[0].text == "\ufffd"
    assert "".join(texts(outcomes)) == answer.text


def test_eos_is_a_token_but_no_text() -> None:
    answer, outcomes = run("he", RowEnd.EOS, (END,))
    assert answer.text == "he"
    assert answer.num_tokens == 2
    token = outcomes[-1].tokens.tokens[0]
    assert (token.special, token.text) == (True, made.SPECIAL)
    assert outcomes[-1].reason == EOS


def test_eos_text_is_kept_only_with_special_and_stop_texts() -> None:
    kept, _ = run("he", RowEnd.EOS, (END,), skip_special_tokens=False)
    assert kept.text == "he<|end|>"
    cut, _ = run("he", RowEnd.EOS, (END,), skip_special_tokens=False, include_stop=False)
    assert cut.text == "he"


def test_stop_text_ends_the_answer_and_stays() -> None:
    answer, outcomes = run("one STOP two", stop=["STOP"])
    assert answer.text == "one STOP"
    assert outcomes[-1].reason == STOP
    assert outcomes[-1].by_text
    assert answer.stop_text == "STOP"


def test_stop_text_is_cut_off_and_never_leaks() -> None:
    answer, outcomes = run("one STOP two", stop=["STOP"], include_stop=False)
    assert answer.text == "one "
    assert "S" not in "".join(texts(outcomes))
    check_offsets(outcomes)


def test_what_was_held_back_comes_with_the_last_token() -> None:
    answer, outcomes = run("one STO", stop=["STOP"], include_stop=False)
    assert texts(outcomes)[-1] == "STO"
    assert answer.text == "one STO"
    assert outcomes[-1].reason == LENGTH


def test_stop_text_in_the_last_token_is_told_though_length_is_reached() -> None:
    _, outcomes = run("one.", stop=["."])
    assert outcomes[-1].reason == STOP
    assert not outcomes[-1].by_text  # the shards have ended it too


def test_stop_token() -> None:
    stop = ids_of("!")[0]
    kept, outcomes = run("hi!", RowEnd.STOP_TOKEN, stop_token_ids=[stop])
    assert (kept.text, outcomes[-1].reason) == ("hi!", STOP)
    cut, _ = run("hi!", RowEnd.STOP_TOKEN, stop_token_ids=[stop], include_stop=False)
    assert cut.text == "hi"


def test_stop_texts_do_not_count_before_min_new_tokens() -> None:
    answer, outcomes = run("a.b.c", stop=["."], min_new_tokens=3, max_new_tokens=20)
    assert answer.text == "a.b."
    assert outcomes[-1].reason == STOP


def test_alternatives_are_given_as_asked() -> None:
    top = TopTokens((ids_of("a")[0], END), (-0.1, -2.5))
    answer = Answer(valid(top_n_tokens=2), PIECES)
    (token,) = answer.push(ids_of("a")[0], -0.1, top).tokens.tokens
    assert [(t.text, t.special) for t in token.top] == [("a", False), (made.SPECIAL, True)]
    assert token.top[1].logprob == pytest.approx(-2.5)


def test_prompt_logprobs_in_chunks() -> None:
    request = valid(prompt_logprobs=True)
    answer = Answer(request, PIECES)
    object.__setattr__(request, "prompt_ids", ids_of("héllo"))
    count = len(request.prompt_ids)
    answer.take_prompt_logprobs(PromptLogprobs(1, 1, [-1.0, -2.0]))
    answer.take_prompt_logprobs(PromptLogprobs(1, 3, [-3.0] * (count - 3)))
    tokens = answer.prefill_tokens()
    assert "".join(token.text for token in tokens) == "héllo"
    assert not tokens[0].HasField("logprob")
    assert [token.logprob for token in tokens[1:3]] == [-1.0, -2.0]
    assert all(token.HasField("logprob") for token in tokens[1:])


@pytest.mark.parametrize("include_stop", [True, False])
@pytest.mark.parametrize("cut", range(1, 17))
def test_taken_up_again_anywhere_the_text_goes_on(cut: int, include_stop: bool) -> None:
    text, parameters = "a😀 S ST é STOP b", {"stop": ["STOP"], "include_stop": include_stop}
    whole, first = run(text, **parameters)
    done = first[:cut]
    delivered = [token for outcome in done for token in outcome.tokens.tokens]
    offset = sum(len(outcome.tokens.text) for outcome in done)
    answer = Answer(valid(**parameters), PIECES)
    again = answer.replay(delivered, offset, RowEnd.NONE)
    outcomes = [again]
    if not again.reason:
        for id_ in ids_of(text)[cut:]:
            outcomes.append(answer.push(id_))
            if outcomes[-1].reason:
                break
    assert outcomes[-1].reason == STOP
    given = "".join(texts(done)) + "".join(texts(outcomes))
    assert given == whole.text == answer.text
    assert answer.num_tokens == whole.num_tokens


def test_taken_up_again_with_text_that_had_not_been_sent() -> None:
    tokens = [router_pb2.Token(id=id_) for id_ in ids_of("abc")]
    answer = Answer(valid(), PIECES)
    again = answer.replay(tokens, 1, RowEnd.LENGTH)
    assert (again.tokens.text, again.tokens.text_offset) == ("bc", 1)
    assert again.reason == LENGTH


def test_the_processor_makes_answers_and_knows_how_rows_end() -> None:
    outputs = OutputProcessor(PIECES, [END])
    request = valid(max_new_tokens=3, min_new_tokens=1)
    answer = outputs.answer(request)
    output = RowOutput(Request(7, request.prompt_ids, request.sampling))
    assert answer.take(output) is None
    output.token_id, output.logprob = ids_of("a")[0], -0.5
    outcome = answer.take(output)
    assert outcome is not None
    assert outcome.tokens.text == "a"
    assert outputs.end_of(request, [5]) is RowEnd.NONE
    assert outputs.end_of(request, [5, END]) is RowEnd.EOS
    assert outputs.end_of(request, [END]) is RowEnd.NONE  # min_new_tokens
    assert outputs.end_of(request, [5, 5, 5]) is RowEnd.LENGTH
    assert outputs.end_of(valid(ignore_eos=True), [5, END]) is RowEnd.NONE
