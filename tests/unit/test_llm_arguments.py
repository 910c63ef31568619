"""What LLM takes: its arguments as flags, the forms of prompts, conversations, results."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from headgate import LLM, SamplingParams
from headgate.launcher.cli import parse_serve
from headgate.llm import _derived_seed, _each
from headgate.llm_arguments import check_others, to_flags
from headgate.outputs import request_output
from headgate.prompts import Prompt, read_prompts
from headgate.proto import router_pb2
from headgate.speculative_config import draft_tokens


def arguments(**given: Any) -> dict[str, Any]:
    defaults = {
        name: parameter.default for name, parameter in inspect.signature(LLM).parameters.items()
    }
    return {**defaults, **given}


def test_arguments_are_flags() -> None:
    flags = to_flags(
        arguments(
            model="some/model",
            tensor_parallel_size=3,
            dtype="half",
            kv_cache_dtype="fp8",
            max_model_len=100,
            gpu_memory_utilization=0.9,
            max_num_seqs=7,
            enable_prefix_caching=False,
            max_logprobs=4,
            speculative_config={"method": "ngram", "num_speculative_tokens": 5},
        )
    )
    config = parse_serve(flags, {})
    assert (config.model_id, config.num_shard, config.dtype) == ("some/model", 3, "float16")
    assert (config.max_total_tokens, config.cuda_memory_fraction) == (100, 0.9)
    assert config.kv_cache_dtype == "fp8_e4m3fn"
    assert (config.max_batch_size, config.max_concurrent_requests) == (7, 14)
    assert config.disable_prefix_caching and config.max_top_n_tokens == 4
    assert config.speculate == 5


def test_the_defaults_leave_the_rest_to_the_server() -> None:
    config = parse_serve(to_flags(arguments()), {})
    plain = parse_serve([], {})
    assert config.num_shard == 1 and config.max_stop_sequences > 100
    assert (config.dtype, config.max_batch_size) == (plain.dtype, plain.max_batch_size)
    assert config.max_concurrent_requests == plain.max_concurrent_requests


def test_unknown_and_refused_arguments() -> None:
    check_others({"enforce_eager": True, "swap_space": 8, "pipeline_parallel_size": 1})
    with pytest.raises(TypeError, match="wings, beak"):
        LLM("m", wings=2, enforce_eager=True, beak=1)
    with pytest.raises(ValueError, match="`pipeline_parallel_size` = 2"):
        LLM("m", pipeline_parallel_size=2)
    with pytest.raises(ValueError, match="`tokenizer` = 'other'"):
        LLM("m", tokenizer="other")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"method": "eagle3", "model": "org/draft"}, "`method` = 'eagle3' .* only 'ngram'"),
        ({"model": "org/draft"}, "`model` = 'org/draft' .* only 'ngram'"),
        ({"method": None}, "`method` is missing"),
        ({"disable_by_batch_size": 8}, "`disable_by_batch_size` = 8 is not supported"),
        ({"num_speculative_tokens": 0}, "`num_speculative_tokens` .* from 1 to 64, not 0"),
        ({"num_speculative_tokens": 65}, "`num_speculative_tokens` .* from 1 to 64, not 65"),
        ({"num_speculative_tokens": True}, "`num_speculative_tokens` .* whole number .* not True"),
        ({"num_speculative_tokens": None}, "`num_speculative_tokens` must be .* not None"),
    ],
)
def test_what_speculation_is_refused(changed: dict[str, Any], said: str) -> None:
    config = {"method": "ngram", "num_speculative_tokens": 5, **changed}
    with pytest.raises(ValueError, match=f"`speculative_config`: {said}"):
        LLM("m", speculative_config=config)


def test_keys_of_speculation_that_change_no_answer() -> None:
    neutral = {"prompt_lookup_max": 4, "prompt_lookup_min": 2, "parallel_drafting": False}
    config = {"method": "ngram", "num_speculative_tokens": 3, "quantization": None, **neutral}
    assert draft_tokens(config, "it") == 3
    with pytest.raises(ValueError, match="must be an object with keys, not 3"):
        draft_tokens(3, "it")


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("a", [Prompt("a")]),
        (["a", "b"], [Prompt("a"), Prompt("b")]),
        ([1, 2], [Prompt(token_ids=(1, 2))]),
        ([[1, 2], [3]], [Prompt(token_ids=(1, 2)), Prompt(token_ids=(3,))]),
        ({"prompt_token_ids": [1]}, [Prompt(token_ids=(1,))]),
        (
            [{"prompt": "a"}, {"prompt_token_ids": [1], "prompt": "b"}],
            [Prompt("a"), Prompt("b", (1,))],
        ),
        ([], []),
    ],
)
def test_prompts(given: Any, read: list[Prompt]) -> None:
    assert read_prompts(given) == read


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        (3, TypeError, "int"),
        (["a", 3.5], TypeError, "prompt 1"),
        (["a", {}], ValueError, "prompt 1 has neither"),
        ([{"prompt_token_ids": []}], ValueError, "prompt 0"),
        ([{"prompt": "a", "multi_modal_data": {"image": 1}}], ValueError, "multi_modal_data"),
        ([[-1]], ValueError, "prompt 0"),
    ],
)
def test_what_is_no_prompt(given: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        read_prompts(given)


def test_parameters_for_each() -> None:
    one, two = SamplingParams(), SamplingParams(temperature=0)
    assert _each(one, 2) == [one, one] and _each([one, two], 2) == [one, two]
    with pytest.raises(ValueError, match="3 prompts and 2"):
        _each([one, two], 3)


def test_derived_seeds_differ() -> None:
    seeds = {_derived_seed(seed, number) for seed in (0, 1) for number in range(100)}
    assert len(seeds) == 200 and all(0 <= seed < 2**63 for seed in seeds)


def test_outputs() -> None:
    other = router_pb2.Token(id=5, text="e", logprob=-0.5)
    own = router_pb2.Token(id=4, text="d", logprob=-1.5)
    chosen = router_pb2.Token(id=4, text="d", logprob=-1.5, top=[other, own])
    far = router_pb2.Token(id=9, text="i", logprob=-3, top=[other, own])
    response = router_pb2.GenerateResponse(
        tokens=[chosen, far],
        finished=router_pb2.Finished(
            generated_text="d", reason=router_pb2.FINISH_REASON_STOP_SEQUENCE, cached_tokens=16
        ),
    )
    output = request_output("7", "abc", [1, 2], response, logprobs=2, prompt_logprobs=None)
    (answer,) = output.outputs
    assert (answer.stop_reason, answer.finish_reason, answer.text) == (9, "stop", "d")
    assert answer.token_ids == [4, 9] and answer.cumulative_logprob == -4.5
    assert answer.logprobs is not None
    assert {id_: entry.rank for id_, entry in answer.logprobs[0].items()} == {4: 2, 5: 1}
    assert {id_: entry.rank for id_, entry in answer.logprobs[1].items()} == {9: None, 5: 1, 4: 2}
    assert output.prompt_logprobs is None and output.num_cached_tokens == 16
    plain = request_output("7", None, [1], response, logprobs=None, prompt_logprobs=None)
    assert plain.outputs[0].logprobs is None and plain.outputs[0].cumulative_logprob is None
