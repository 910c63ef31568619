"""The command line of vLLM's server: every flag's fate, defaults, environment."""

from __future__ import annotations

import shlex
from collections import Counter

import pytest

from headgate.entrypoints.command_line import serve_words
from headgate.entrypoints.flags import VLLM_FLAGS
from headgate.launcher.cli import main, parse_serve
from headgate.launcher.config import LauncherConfig
from headgate.launcher.errors import LaunchError
from headgate.launcher.flag import Policy
from headgate.launcher.flags import FLAGS

# As published by vLLM and its users.
PUBLISHED = (
    "--model facebook/opt-125m",
    "--model M --tensor-parallel-size 4 --gpu-memory-utilization 0.95 --max-model-len 8k",
    "--model M -tp 2 --dtype half --trust-remote-code --disable-log-requests --port 8001",
    "--host 0.0.0.0 --model M --swap-space 16 --max-num-seqs 64 --max_num_batched_tokens 4096",
    "--model=M --served-model-name gpt --api-key token-abc123 --enforce-eager -O3",
    "--model M --enable-prefix-caching --enable-chunked-prefill --block-size 32 --seed 0",
    "--model M --speculative-config '{\"method\": \"ngram\", \"num_speculative_tokens\": 5}'",
    "--model M --dtype auto --kv-cache-dtype auto --allowed-origins '[\"*\"]'",
)  # fmt: skip


def resolve(line: str, **environment: str) -> LauncherConfig:
    return parse_serve(serve_words(shlex.split(line), environment)[0], environment)


def test_names_are_unique_and_flags_of_ours_exist() -> None:
    assert [name for name, count in Counter(f.name for f in VLLM_FLAGS).items() if count > 1] == []
    ours = {f"--{flag.name}" for flag in FLAGS}
    assert {f.note for f in VLLM_FLAGS if f.policy is Policy.WORKS} <= ours


@pytest.mark.parametrize("line", PUBLISHED)
def test_published_lines(line: str) -> None:
    assert resolve(line).model_id in ("M", "facebook/opt-125m")


def test_values() -> None:
    config = resolve(
        "--model M --tensor_parallel_size 3 --max-model-len 4k --gpu-memory-utilization 0.5 "
        "--dtype float --kv-cache-dtype fp8_e4m3 --max-num-seqs 7 "
        "--max-num-batched-tokens=1K --no-enable-prefix-caching "
        "--host 127.0.0.1 --api-key k --served-model-name s --block-size 32 --revision r "
        '--allowed-origins \'["http://a", "http://b"]\' --download-dir /d --max-logprobs 3 '
        "--chat-template /t.jinja"
    )
    assert (config.num_shard, config.max_total_tokens, config.dtype) == (3, 4000, "float32")
    assert config.kv_cache_dtype == "fp8_e4m3fn"
    assert (config.cuda_memory_fraction, config.max_batch_size) == (0.5, 7)
    assert (config.max_batch_prefill_tokens, config.disable_prefix_caching) == (1024, True)
    assert (config.hostname, config.port, config.api_key) == ("127.0.0.1", 8000, "k")
    assert config.cors_allow_origin == ("http://a", "http://b")
    assert (config.served_model_name, config.block_size, config.revision) == ("s", 32, "r")
    assert config.tokenizer_config_path == "/t.jinja"
    assert (config.huggingface_hub_cache, config.max_top_n_tokens) == ("/d", 3)


def test_environment_and_our_own_flags() -> None:
    config = resolve("--kernels reference --strict", MODEL_NAME="m", VLLM_API_KEY="k", PORT="99")
    assert (config.model_id, config.api_key, config.port) == ("m", "k", 8000)
    assert config.kernels == "reference" and config.strict
    assert resolve("--model M --api-key b", MODEL_NAME="m", VLLM_API_KEY="k").model_id == "M"
    assert resolve("", MODEL_ID="there").model_id == "there"


def test_no_effect_is_said_and_neutral_values_are_not() -> None:
    _, notes = serve_words(["--swap-space", "4", "--enforce-eager"], {})
    assert [note.split()[0] for note in notes] == ["--enforce-eager", "--swap-space"]
    quiet = "--pipeline-parallel-size 1 --load-format auto --no-enable-lora --hf-overrides {}"
    assert serve_words(shlex.split(quiet), {})[1] == []


@pytest.mark.parametrize(
    "line",
    [
        "--pipeline-parallel-size 2",
        "--enable-lora",
        "--ssl-keyfile k",
        "--tokenizer other",
        "--allowed-origins x",
        "--served-model-name a b",
        "--speculative-model org/draft --num-speculative-tokens 5",
        "--spec-method eagle3 --spec-tokens 2",
        "--speculative-config [ngram]",
    ],
)
def test_refusals_name_the_flag(line: str) -> None:
    with pytest.raises(LaunchError, match=line.split()[0]):
        serve_words(shlex.split(line), {})


@pytest.mark.parametrize(
    "line",
    [
        '--speculative-config \'{"method": "ngram", "num_speculative_tokens": 4}\'',
        '-sc \'{"model": "[ngram]", "num_speculative_tokens": 4, "quantization": null}\'',
        '--speculative_model "[ngram]" --num_speculative_tokens 4',
        "--spec-method ngram --spec-tokens 4",
    ],
)
def test_ngrams_are_speculated_with(line: str) -> None:
    assert resolve(line).speculate == 4
    assert serve_words(shlex.split(line), {})[1] == []


def test_speculation_left_to_the_server() -> None:
    for line in ("", "--speculative-config null", "--speculative-config {}"):
        assert resolve(line).speculate is None


def test_sizes_of_ngrams_have_no_effect() -> None:
    config = '{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}'
    words, notes = serve_words(["--speculative-config", config], {})
    assert "--speculate=4" in words and "`prompt_lookup_max`" in notes[0]
    _, notes = serve_words(["--ngram-prompt-lookup-max", "3"], {})
    assert notes[0].startswith("--ngram-prompt-lookup-max has no effect")


def test_a_setting_is_given_once() -> None:
    with pytest.raises(LaunchError, match="--spec-tokens says --speculate a second time"):
        serve_words(["--num-speculative-tokens", "4", "--spec-tokens", "3"], {})


def test_a_refused_value_is_named_where_others_are_served() -> None:
    for line, shown in (
        ("--speculative-model org/draft", "--speculative-model org/draft cannot"),
        ("--hf-token secret", "--hf-token cannot"),
    ):
        with pytest.raises(LaunchError, match=shown):
            serve_words(line.split(), {})


def test_serve_takes_the_model_by_its_place(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["serve", "M", "--model-id", "N"])
    assert caught.value.code == 2 and "give one of the two" in capsys.readouterr().err
    assert main(["serve", "/nowhere/M"]) == 1
    assert "/nowhere/M" in capsys.readouterr().err
