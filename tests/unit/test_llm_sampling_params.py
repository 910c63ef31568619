"""SamplingParams with vLLM's names: rules, what is refused, what the router gets."""

from __future__ import annotations

from typing import Any

import pytest

from headgate import BeamSearchParams, SamplingParams
from headgate.router import sampling_params as router


def test_defaults_sample_sixteen_tokens() -> None:
    wanted = SamplingParams().to_router()
    assert wanted.samples and wanted.max_new_tokens == 16
    assert (wanted.include_stop, wanted.logprobs, wanted.top_k) == (False, False, None)
    wanted.check(router.ParameterLimits(4, 5, 2, 128))


def test_greedy_sends_nothing_about_sampling() -> None:
    params = SamplingParams(temperature=0, top_p=0.5, top_k=3, min_p=0.1, seed=4)
    wanted = params.to_router()
    assert params.greedy and not wanted.samples and wanted.seed is None


def test_every_served_field_arrives() -> None:
    wanted = SamplingParams(
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        repetition_penalty=1.2,
        temperature=0.7,
        top_p=0.9,
        top_k=40,
        min_p=0.05,
        seed=3,
        stop="x",
        stop_token_ids=[7, 8, 7],
        ignore_eos=True,
        max_tokens=None,
        min_tokens=2,
        logprobs=3,
        prompt_logprobs=0,
        skip_special_tokens=False,
        include_stop_str_in_output=True,
        truncate_prompt_tokens=9,
    ).to_router()
    assert wanted == router.SamplingParams(
        do_sample=True,
        temperature=0.7,
        top_k=40,
        top_p=0.9,
        min_p=0.05,
        repetition_penalty=1.2,
        frequency_penalty=-0.5,
        presence_penalty=0.5,
        seed=3,
        min_new_tokens=2,
        ignore_eos=True,
        stop=("x",),
        stop_token_ids=(7, 8),
        include_stop=True,
        skip_special_tokens=False,
        truncate=9,
        logprobs=True,
        top_n_tokens=3,
        prompt_logprobs=True,
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", None),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", 1.1),
        ("seed", -2),
        ("stop", [""]),
        ("stop_token_ids", ["a"]),
        ("max_tokens", 0),
        ("min_tokens", 17),
        ("logprobs", -1),
        ("prompt_logprobs", -2),
        ("truncate_prompt_tokens", -1),
        ("n", 0),
        ("best_of", 0),
        ("logit_bias", {"a": 2.0}),
        ("logit_bias", {1: float("nan")}),
        ("allowed_token_ids", []),
        ("early_stopping", "soon"),
        ("early_stopping", True),
        ("length_penalty", 2.0),
        ("allowed_token_ids", ["a"]),
        ("structured_outputs", object()),
        ("structured_outputs", {}),
        ("structured_outputs", {"regex": "a", "json": "{}"}),
        ("structured_outputs", {"regex": 5}),
        ("structured_outputs", {"pattern": "a"}),
        ("guided_decoding", {"choice": "ab"}),
        ("bad_words", ["no", ""]),
        ("bad_words", "no"),
        ("logprob_token_ids", [1]),
        ("logits_processors", [print]),
    ],
)
def test_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`{field}`"):
        SamplingParams(**{field: value})


def test_neutral_values_of_what_is_not_served() -> None:
    SamplingParams(n=1, best_of=1, logit_bias={}, logprob_token_ids=[], length_penalty=1.0)


def test_beams() -> None:
    asked = SamplingParams(
        use_beam_search=True, n=2, best_of=4, temperature=0, length_penalty=0.5, early_stopping=True
    )
    wanted = asked.to_router()
    assert (wanted.beam_width, wanted.n, wanted.best_of) == (4, 2, None)
    assert (wanted.length_penalty, wanted.early_stopping) == (0.5, 1)
    assert wanted.searches and not wanted.samples
    with pytest.raises(ValueError, match="`temperature`"):
        SamplingParams(use_beam_search=True, temperature=0.5)
    with pytest.raises(ValueError, match="`n`"):
        BeamSearchParams(beam_width=0, max_tokens=4)
    assert BeamSearchParams(beam_width=3, max_tokens=4).to_sampling_params().n == 3


def test_biases_are_cut() -> None:
    wanted = SamplingParams(logit_bias={"5": 200, 7: -0.5}, allowed_token_ids=[5, 7]).to_router()  # type: ignore[dict-item]
    assert SamplingParams(bad_words=["a b", "c"]).to_router().bad_words == ("a b", "c")
    assert wanted.logit_bias == ((5, 100.0), (7, -0.5))
    assert wanted.allowed_token_ids == (5, 7)


def test_values_that_mean_others() -> None:
    params = SamplingParams(seed=-1, top_k=-1, logprobs=True, prompt_logprobs=False)
    assert (params.seed, params.logprobs, params.prompt_logprobs) == (None, 1, None)
    with pytest.warns(UserWarning, match=r"0\.001 is raised to 0\.01"):
        assert SamplingParams(temperature=0.001).temperature == 0.01
    with pytest.raises(ValueError, match="`detokenize`"):
        SamplingParams(stop="x", detokenize=False)


def test_a_later_change_is_checked_too() -> None:
    params = SamplingParams()
    params.top_p = 3
    with pytest.raises(ValueError, match="`top_p`"):
        params.to_router()
