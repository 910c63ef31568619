"""Every rule with its message; what is neutral; what a valid request looks like."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from headgate.proto import router_pb2
from headgate.proto.messages import Pooling
from headgate.router.config import RouterConfig
from headgate.router.errors import AdapterNotFoundError, ValidationError
from headgate.router.sampling_params import MIN_TEMPERATURE, SamplingParams
from headgate.router.tokenizer import Tokenizer
from headgate.router.validation import Validator, ValidRequest
from tests.unit import tokenizers_for_tests as made

CONFIG = RouterConfig(
    model_path="",
    model_id="m",
    served_model_name="m",
    control_address="",
    gateway_address="",
    grpc_host="127.0.0.1",
    grpc_port=0,
    max_input_tokens=20,
    max_total_tokens=30,
    max_batch_prefill_tokens=16,
)


@pytest.fixture(scope="module")
def validator() -> Validator:
    return Validator(CONFIG, Tokenizer(made.byte_level(), workers=1))


def validate(
    validator: Validator,
    text: str = "abc",
    delivered: router_pb2.Delivered | None = None,
    request: dict[str, Any] | None = None,
    **parameters: Any,
) -> ValidRequest:
    prompt: dict[str, Any] = {} if text is None else {"text": text}
    message = router_pb2.GenerateRequest(
        parameters=router_pb2.Parameters(**parameters), **{**prompt, **(request or {})}
    )
    return asyncio.run(validator.validate(message, delivered=delivered))


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"best_of": 2}, "best_of", "you must use sampling when `best_of` is > 1"),
    ({"best_of": 3, "do_sample": True}, "best_of", "`best_of` must be > 0 and <= 2. Given: 3"),
    ({"best_of": 0}, "best_of", "`best_of` must be > 0 and <= 2. Given: 0"),
    (
        {"best_of": 2, "n": 3, "do_sample": True},
        "best_of",
        "`best_of` must be >= `n` = 3. Given: 2",
    ),
    ({"temperature": 0.0}, "temperature", "`temperature` must be strictly positive"),
    ({"temperature": math.nan}, "temperature", "`temperature` must be strictly positive"),
    ({"temperature": math.inf}, "temperature", "`temperature` must be strictly positive"),
    (
        {"repetition_penalty": -1.0},
        "repetition_penalty",
        "`repetition_penalty` must be strictly positive",
    ),
    (
        {"frequency_penalty": 2.5},
        "frequency_penalty",
        "`frequency_penalty` must be >= -2.0 and <= 2.0",
    ),
    (
        {"presence_penalty": -2.5},
        "presence_penalty",
        "`presence_penalty` must be >= -2.0 and <= 2.0",
    ),
    ({"top_p": 0.0}, "top_p", "`top_p` must be > 0.0 and < 1.0"),
    ({"top_p": 1.5}, "top_p", "`top_p` must be > 0.0 and < 1.0"),
    ({"top_p": math.nan}, "top_p", "`top_p` must be > 0.0 and < 1.0"),
    ({"typical_p": 0.0}, "typical_p", "`typical_p` must be > 0.0 and < 1.0"),
    ({"min_p": 1.5}, "min_p", "`min_p` must be >= 0.0 and <= 1.0"),
    ({"top_k": 0}, "top_k", "`top_k` must be strictly positive"),
    ({"max_new_tokens": 0}, "max_new_tokens", "`max_new_tokens` must be strictly positive"),
    ({"stop": list("abcde")}, "stop", "`stop` supports up to 4 stop sequences. Given: 5"),
    ({"stop": [""]}, "stop", "`stop` sequences cannot be empty"),
    ({"top_n_tokens": 6}, "top_n_tokens", "`top_n_tokens` must be >= 0 and <= 5. Given: 6"),
    (
        {"prompt_top_n_tokens": 6},
        "prompt_top_n_tokens",
        "`prompt_top_n_tokens` must be >= 0 and <= 5. Given: 6",
    ),
    (
        {"logit_bias": {1: 100.5}},
        "logit_bias",
        "`logit_bias` values must be >= -100 and <= 100",
    ),
    (
        {"logit_bias": {1: math.nan}},
        "logit_bias",
        "`logit_bias` values must be >= -100 and <= 100",
    ),
    ({"bad_words": ["a", ""]}, "bad_words", "`bad_words` cannot be empty"),
    (
        {"bad_words": ["a"] * 1025},
        "bad_words",
        "`bad_words` supports up to 1024 words. Given: 1025",
    ),
    ({"beam_width": 0}, "beam_width", "`beam_width` must be > 0 and <= 128. Given: 0"),
    ({"beam_width": 2, "n": 3}, "beam_width", "`beam_width` must be >= `n` = 3. Given: 2"),
    *(
        (
            {"length_penalty": value},
            "length_penalty",
            "`length_penalty` must be >= -20 and <= 20",
        )
        for value in (math.inf, math.nan, 20.5, -21.0)
    ),
    *(
        (
            {"beam_width": 2, name: value},
            name,
            f"`{name}` cannot be combined with beam search",
        )
        for name, value in {
            "do_sample": True,
            "temperature": 0.5,
            "top_k": 3,
            "top_p": 0.5,
            "typical_p": 0.5,
            "min_p": 0.5,
            "repetition_penalty": 1.5,
            "frequency_penalty": 0.5,
            "presence_penalty": 0.5,
            "watermark": True,
            "logit_bias": {1: 1.0},
            "allowed_token_ids": [1],
            "bad_words": ["x"],
            "top_n_tokens": 1,
            "stop": ["x"],
        }.items()
    ),
    ({"n": 0}, "n", "`n` must be > 0 and <= 128. Given: 0"),
    ({"n": 129}, "n", "`n` must be > 0 and <= 128. Given: 129"),
    ({"text": ""}, "inputs", "`inputs` cannot be empty"),
    ({"text": None}, "inputs", "`inputs` cannot be empty"),
    (
        {"truncate": 0},
        "truncate",
        "`truncate` must be strictly positive and less than 20. Given: 0",
    ),
    (
        {"truncate": 21},
        "truncate",
        "`truncate` must be strictly positive and less than 20. Given: 21",
    ),
    (
        {"max_new_tokens": 28},
        "max_new_tokens",
        "`inputs` tokens + `max_new_tokens` must be <= 30. "
        "Given: 3 `inputs` tokens and 28 `max_new_tokens`",
    ),
    ({"text": "a" * 21}, "inputs", "`inputs` must have less than 20 tokens. Given: 21"),
    (
        {"max_new_tokens": 2, "min_new_tokens": 3},
        "min_new_tokens",
        "`min_new_tokens` must be <= `max_new_tokens` = 2. Given: 3",
    ),
    (
        {"stop_token_ids": [5, 263]},
        "stop_token_ids",
        "`stop_token_ids` holds token 263, the vocabulary ends at 262",
    ),
    (
        {"request": {"token_ids": router_pb2.TokenIds(ids=[1, 263])}, "text": None},
        "inputs",
        "`inputs` holds token 263, the vocabulary ends at 262",
    ),
    (
        {"request": {"token_ids": router_pb2.TokenIds()}, "text": None},
        "inputs",
        "`inputs` cannot be empty",
    ),
]


def test_an_adapter_that_is_not_loaded_is_not_found(validator: Validator) -> None:
    with pytest.raises(AdapterNotFoundError) as caught:
        validate(validator, request={"adapter_id": "x"})
    assert (caught.value.field, caught.value.http_status) == ("adapter_id", 404)
    assert caught.value.message == "`adapter_id`: there is no adapter `x`"


def test_grammars_are_refused_where_the_server_says_so() -> None:
    config = replace(CONFIG, grammar_support=False)
    without = Validator(config, Tokenizer(made.byte_level(), workers=1))
    with pytest.raises(ValidationError, match="grammar is not supported"):
        validate(without, grammar=router_pb2.Grammar(regex="a"))


def test_watermarks_take_their_strength_from_the_server(validator: Validator) -> None:
    marked = validate(validator, watermark=True).sampling
    assert (marked.watermark_gamma, marked.watermark_delta) == (0.5, 2.0)
    assert validate(validator, watermark=False).sampling.watermark_gamma == 0


@pytest.mark.parametrize(("given", "field", "message"), REFUSED)
def test_refused(validator: Validator, given: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        validate(validator, **given)
    assert caught.value.message == f"Input validation error: {message}"
    assert caught.value.field == field
    assert caught.value.http_status == 422


def test_first_broken_rule_in_tgi_order_is_told(validator: Validator) -> None:
    with pytest.raises(ValidationError) as caught:
        validate(validator, text="", top_k=0, temperature=-1.0, max_new_tokens=0)
    assert caught.value.field == "temperature"


def test_greedy_by_default_with_as_many_tokens_as_fit(validator: Validator) -> None:
    valid = validate(validator)
    assert valid.sampling.temperature == 0.0
    assert valid.seed is None
    assert valid.sampling.max_new_tokens == 27
    assert valid.sampling.logprobs
    assert valid.include_stop
    assert valid.skip_special_tokens
    assert valid.prompt_characters == 3


@pytest.mark.parametrize(
    "neutral",
    [
        {"temperature": 1.0},
        {"top_p": 1.0},
        {"typical_p": 1.0},
        {"min_p": 0.0},
        {"best_of": 1},
        {"n": 1},
        {"watermark": False},
        {"do_sample": False},
        {"top_n_tokens": 0},
        {"repetition_penalty": 1.0},
    ],
)
def test_neutral_values_are_as_if_absent(validator: Validator, neutral: dict[str, Any]) -> None:
    assert validate(validator, **neutral).sampling == validate(validator).sampling


@pytest.mark.parametrize(
    "given",
    [
        {"do_sample": True},
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_p": 0.9},
        {"typical_p": 0.9},
        {"min_p": 0.1},
    ],
)
def test_sampling_is_switched_on_and_a_seed_drawn(
    validator: Validator, given: dict[str, Any]
) -> None:
    first, second = validate(validator, **given), validate(validator, **given)
    assert first.sampling.temperature == given.get("temperature", 1.0)
    assert first.seed is not None
    assert first.seed == first.sampling.seed < 2**63
    assert first.seed != second.seed


def test_given_seed_is_kept_and_greedy_has_none(validator: Validator) -> None:
    assert validate(validator, do_sample=True, seed=2**64 - 1).seed == 2**64 - 1
    assert validate(validator, seed=5).seed is None


def test_clamps(validator: Validator) -> None:
    assert validate(validator, top_k=2**31).sampling.top_k == validator.vocab_size
    assert validate(validator, temperature=1e-20).sampling.temperature == MIN_TEMPERATURE


def test_truncation_keeps_the_last_tokens(validator: Validator) -> None:
    whole = validate(validator, text="abcdef")
    cut = validate(validator, text="abcdef" * 10, truncate=4)
    assert cut.prompt_ids == whole.prompt_ids[-4:]
    assert cut.prompt_characters == 60


def test_embeddings_take_no_parameters_but_truncate(validator: Validator) -> None:
    wish = {"embedding": router_pb2.Embedding()}
    valid = validate(validator, "abcdef", request=wish, truncate=4)
    assert len(valid.prompt_ids) == 4 and valid.normalize
    assert valid.sampling.pooling is Pooling.MEAN and valid.sampling.max_new_tokens == 1
    last = router_pb2.Embedding(pooling=router_pb2.POOLING_LAST, normalize=False)
    valid = validate(validator, request={"embedding": last})
    assert valid.sampling.pooling is Pooling.LAST and not valid.normalize
    for given in ({"temperature": 0.5}, {"n": 2}, {"stop": ["x"]}, {"max_new_tokens": 1}):
        with pytest.raises(ValidationError, match="no meaning for an embedding") as caught:
            validate(validator, request=wish, **given)
        assert caught.value.field in given
    assert validate(validator, "a" * 20, request=wish)
    with pytest.raises(ValidationError) as caught:
        validate(validator, "a" * 21, request=wish)
    assert caught.value.field == "inputs"


def test_largest_request_that_fits(validator: Validator) -> None:
    assert validate(validator, text="a" * 20, max_new_tokens=10).sampling.max_new_tokens == 10
    assert validate(validator, text="a" * 20).sampling.max_new_tokens == 10


def test_delivered_progress(validator: Validator) -> None:
    begun = router_pb2.DeliveredAnswer(tokens=[router_pb2.Token(id=5)], text_offset=1)
    done = router_pb2.DeliveredAnswer(index=2, finished=True)
    delivered = router_pb2.Delivered(answers=[begun, done], seed=77)
    valid = validate(validator, delivered=delivered, do_sample=True, n=3)
    assert valid.seed == valid.sampling.seed == 77
    assert [token.id for token in valid.progress[0].tokens] == [5]
    assert valid.progress[2].finished and not valid.progress[0].finished
    assert 1 not in valid.progress


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([{"index": 2}], "has answer 2 of 2"),
        ([{"index": 0, "finished": True}, {"index": 1, "finished": True}], "ends of all answers"),
        ([{"index": 1, "tokens": [router_pb2.Token()] * 2}], "more tokens than"),
    ],
)
def test_progress_that_cannot_be(
    validator: Validator, answers: list[dict[str, Any]], message: str
) -> None:
    delivered = router_pb2.Delivered(answers=[router_pb2.DeliveredAnswer(**a) for a in answers])
    with pytest.raises(ValidationError, match=message):
        validate(validator, delivered=delivered, n=2, max_new_tokens=1)


def test_parameters_survive_the_wire() -> None:
    given = SamplingParams(
        temperature=0.5,
        stop=("a", "b"),
        stop_token_ids=(1,),
        seed=2**64 - 1,
        logit_bias=((3, -1.5), (7, 100.0)),
        allowed_token_ids=(7, 8),
        bad_words=("a b", "c"),
    )
    assert SamplingParams.from_proto(given.to_proto()) == given


def test_what_the_tokenizer_cannot_take(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer(made.byte_level(), workers=1)

    async def fails(text: str, *, add_special_tokens: bool = True) -> list[int]:
        raise Exception("no such word")  # what the library raises

    monkeypatch.setattr(tokenizer, "encode", fails)
    with pytest.raises(ValidationError, match="tokenizer error no such word"):
        validate(Validator(CONFIG, tokenizer))


def test_a_server_may_allow_no_best_of() -> None:
    single = Validator(replace(CONFIG, max_best_of=1), Tokenizer(made.byte_level(), workers=1))
    with pytest.raises(ValidationError, match="`best_of` != 1 is not allowed for this endpoint"):
        validate(single, best_of=2, do_sample=True)


def test_bad_words_are_meant_with_and_without_a_space_before(validator: Validator) -> None:
    def ids(text: str) -> tuple[int, ...]:
        return tuple(asyncio.run(validator._tokenizer.encode(text, add_special_tokens=False)))

    given = validate(validator, bad_words=["we", " we", "\n", "  "], max_new_tokens=4)
    wanted = (ids("we"), ids(" we"), ids("\n"), ids(" \n"), ids("  "))
    assert given.sampling.bad_words == wanted and len(wanted[1]) == 2
    # What is longer than the answer cannot come.
    short = validate(validator, bad_words=["we", "abcd"], max_new_tokens=2)
    assert short.sampling.bad_words == wanted[:2]


def test_long_texts_are_tokenised_like_short_ones(validator: Validator) -> None:
    encode: Callable[..., Any] = validator._tokenizer.encode
    long = asyncio.run(encode("hello " * 1000))
    assert long == asyncio.run(encode("hello ")) * 1000


async def test_the_loop_runs_on_while_a_long_text_is_tokenised(validator: Validator) -> None:
    """The library's `encode` would hold the interpreter, and with it every step, for all of it."""
    text = "The river was quiet in the morning, and no lantern burned. " * 10_000
    encoding = asyncio.ensure_future(validator._tokenizer.encode(text))
    turns = 0
    while not encoding.done():
        await asyncio.sleep(0.001)
        turns += 1
    assert len(await encoding) > 100_000 and turns > 20


def test_spans_are_in_characters(validator: Validator) -> None:
    spans = asyncio.run(validator._tokenizer.spans("né 😀!"))
    assert [(span.text, span.start, span.stop) for span in spans][-1] == ("!", 4, 5)
    assert all(span.text == "né 😀!"[span.start : span.stop] for span in spans)
