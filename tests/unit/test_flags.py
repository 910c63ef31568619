"""Flags, environment and defaults; TGI's published command lines; the page that documents them."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from headgate.entrypoints.command_line import LIMITS
from headgate.entrypoints.flags import VLLM_FLAGS
from headgate.launcher.cli import parse_serve
from headgate.launcher.config import LauncherConfig
from headgate.launcher.errors import LaunchError
from headgate.launcher.flag import Policy
from headgate.launcher.flag_docs import filled
from headgate.launcher.flags import BY_KEY, FLAGS

ROOT = Path(__file__).resolve().parents[2]

# The flags that TGI's launcher had, by its own reference page.
TGI_FLAGS = set(
    """
    model-id revision validation-workers sharded num-shard quantize speculate dtype kv-cache-dtype
    trust-remote-code max-concurrent-requests max-best-of max-stop-sequences max-top-n-tokens
    max-input-tokens max-input-length max-total-tokens waiting-served-ratio
    max-batch-prefill-tokens max-batch-total-tokens max-waiting-tokens max-batch-size cuda-graphs
    hostname port prometheus-port shard-uds-path master-addr master-port huggingface-hub-cache
    weights-cache-override disable-custom-kernels cuda-memory-fraction rope-scaling rope-factor
    json-output otlp-endpoint otlp-service-name cors-allow-origin api-key watermark-gamma
    watermark-delta ngrok ngrok-authtoken ngrok-edge env tokenizer-config-path
    disable-grammar-support max-client-batch-size lora-adapters usage-stats payload-limit
    enable-prefill-logprobs graceful-termination-timeout
""".split()  # noqa: SIM905 (a list would fill fifty lines)
)

# As published in TGI's documents and by its users, the model's id put in for theirs.
PUBLISHED = (
    "--model-id MODEL",
    "--model-id MODEL --port 8080",
    "--model-id MODEL --num-shard 2 --sharded true",
    "--model-id MODEL --disable-custom-kernels",
    "--model-id MODEL --dtype bfloat16 --trust-remote-code",
    "--model-id MODEL --port 8080 --sharded false --trust-remote-code --max-stop-sequences=6",
    "--model-id MODEL --max-input-length 4000 --max-total-tokens 4096 --port 1100 "
    "--master-port 23456 --shard-uds-path /scratch/sockets-1 --huggingface-hub-cache /data/hub",
    "--model-id MODEL --num-shard=1 --port=8080 --max-input-length=4096 --max-total-tokens=8192 "
    "--max-batch-prefill-tokens=16384",
    "--model-id MODEL --sharded false --dtype float16 --disable-custom-kernels --port 8001 "
    "--max-input-length 2048 --max-batch-prefill-tokens 2048 --max-total-tokens 4096 "
    "--max-batch-total-tokens 4096",
    "--model-id MODEL --hostname 0.0.0.0 -p 8080 --cuda-memory-fraction 0.95 --usage-stats off "
    "--max-waiting-tokens 20 --max-batch-size 32 --max-concurrent-requests 256 --json-output",
    "--model-id MODEL --max-input-length 8184 --max-total-tokens 8192 "
    "--max-batch-prefill-tokens 8184 --rope-factor 2.6 --rope-scaling dynamic",
    "--model-id MODEL --cuda-graphs 0 --waiting-served-ratio 1.2 --enable-prefill-logprobs "
    "--validation-workers 4 --revision main --max-client-batch-size 8 --payload-limit 4000000",
)


def resolve(line: str = "", **environment: str) -> LauncherConfig:
    return parse_serve(shlex.split(line), environment)


def refusal(line: str = "", **environment: str) -> str:
    with pytest.raises(LaunchError) as caught:
        resolve(line, **environment)
    return str(caught.value)


def test_every_flag_of_tgi_is_known() -> None:
    assert {flag.name for flag in FLAGS if not flag.own} == TGI_FLAGS


def test_names_are_unique_and_policies_explain_themselves() -> None:
    assert len(BY_KEY) == len(FLAGS)
    for flag in FLAGS:
        assert flag.help.endswith("."), flag.name
        assert bool(flag.note) == (flag.policy is not Policy.WORKS), flag.name


@pytest.mark.parametrize("line", PUBLISHED)
def test_published_command_lines(line: str) -> None:
    assert resolve(line.replace("MODEL", "org/model")).model_id == "org/model"


def test_defaults_are_those_of_tgi() -> None:
    config = resolve()
    assert (config.port, config.hostname, config.max_concurrent_requests) == (3000, "0.0.0.0", 128)
    assert (config.max_best_of, config.max_stop_sequences, config.max_top_n_tokens) == (2, 4, 5)
    assert (config.max_client_batch_size, config.payload_limit) == (4, 2_000_000)
    assert (config.validation_workers, config.graceful_termination_timeout) == (2, 90)
    assert config.warnings == ()


def test_command_line_over_environment_over_default() -> None:
    assert resolve("--port 1", PORT="2").port == 1
    assert resolve("", PORT="2").port == 2
    assert resolve("", PORT="", MODEL_ID=" ", NUM_SHARD="").port == 3000


def test_platforms_name_the_port_and_routes() -> None:
    vertex = {"AIP_HTTP_PORT": "8080", "PORT": "80", "AIP_PREDICT_ROUTE": "/predict"}
    config = resolve("", **vertex)
    assert (config.port, config.predict_route, config.health_route) == (8080, "/predict", "")
    assert resolve("--port 1", **vertex).port == 1
    assert "AIP_HEALTH_ROUTE" in refusal("", AIP_HEALTH_ROUTE="health")


def test_every_flag_that_works_reads_its_variable() -> None:
    samples = {
        "text": "x",
        "path": "/x",
        "integer": "16",
        "number": "1",
        "port": "16",
        "true or false": "true",
        "switch": "1",
        "list": "a,b",
    }
    for flag in FLAGS:
        if flag.policy is Policy.WORKS and flag.env:
            served = [choice for choice in flag.choices if choice not in flag.refused_values]
            text = served[-1] if served else samples[flag.kind.value]
            text = "127.0.0.1" if flag.key == "hostname" else text
            value = getattr(resolve("", **{flag.env: text}), flag.key)
            assert value != flag.default or float(text) == flag.default, flag.name


def test_kubernetes_service_links_and_pod_names() -> None:
    config = resolve(
        "",
        HOSTNAME="tgi-7d9f8-abcde",
        PORT="tcp://10.0.0.1:80",
        GRPC_PORT="tcp://10.0.0.2:9000",
        MASTER_PORT="udp://10.0.0.3:9000",
        PROMETHEUS_PORT="tcp://10.0.0.4:9090",
    )
    assert (config.hostname, config.port) == ("0.0.0.0", 3000)
    assert (config.grpc_port, config.master_port) == (None, None)
    assert len(config.warnings) == 4 and all("Kubernetes" in line for line in config.warnings)
    assert resolve("", HOSTNAME="10.1.2.3").hostname == "10.1.2.3"


def test_sagemaker_names() -> None:
    config = resolve("", HF_MODEL_ID="org/m", HF_MODEL_REVISION="v1", SM_NUM_GPUS="2")
    assert (config.model_id, config.revision, config.num_shard) == ("org/m", "v1", 2)
    assert resolve("", SM_NUM_GPUS="0").num_shard is None
    assert resolve("", MODEL_ID="a", HF_MODEL_ID="b").model_id == "a"


def test_switches_in_the_environment() -> None:
    assert resolve("", JSON_OUTPUT="true").json_output
    assert not resolve("", JSON_OUTPUT="false").json_output
    assert resolve("", PREFIX_CACHING="0").disable_prefix_caching
    assert not resolve("", PREFIX_CACHING="1").disable_prefix_caching


def test_the_old_name_of_max_input_tokens() -> None:
    assert resolve("--max-input-length 7").max_input_tokens == 7
    assert resolve("", MAX_INPUT_LENGTH="7").max_input_tokens == 7
    assert resolve("--max-input-length 7", MAX_INPUT_TOKENS="9").max_input_tokens == 7
    assert resolve("--max-input-tokens 9", MAX_INPUT_LENGTH="7").max_input_tokens == 9
    assert "old name" in refusal("--max-input-length 7 --max-input-tokens 9")


def test_rope_flags_complete_each_other() -> None:
    assert resolve("--rope-factor 2").rope_scaling == "linear"
    assert resolve("--rope-scaling dynamic").rope_factor == 1.0


@pytest.mark.parametrize(
    "line",
    [
        "--waiting-served-ratio 1.2",
        "--max-waiting-tokens 20",
        "--usage-stats off",
        "--disable-custom-kernels",
        "--trust-remote-code",
        "--prometheus-port 9001",
        "--otlp-service-name tgi",
    ],
)
def test_flags_without_effect_say_so_once(line: str) -> None:
    (warning,) = resolve(line).warnings
    assert line.split()[0] in warning


def test_lists_repeat_and_take_commas() -> None:
    origins = resolve("--cors-allow-origin https://a --cors-allow-origin https://b,https://c")
    assert origins.cors_allow_origin == ("https://a", "https://b", "https://c")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--quantize gptq", ("--quantize gptq", "not available", "int8-weight-only")),
        ("--quantize made-up", ("--quantize", "awq")),
        ("--speculate 65", ("--speculate", "from 0 to 64", "65")),
        ("--speculate -1", ("--speculate", "from 0 to 64", "-1")),
        ("--lora-adapters a,b", ("--lora-adapters a,b",)),
        ("--ngrok", ("--ngrok",)),
        ("--otlp-endpoint http://x", ("--otlp-endpoint http://x",)),
        ("--kv-cache-dtype int3", ("--kv-cache-dtype", "int3", "fp8_e4m3fn")),
        ("--port 70000", ("--port", "65535", "70000")),
        ("--port x", ("--port", "whole number", "'x'")),
        ("--num-shard 0", ("--num-shard", "at least 1")),
        ("--cuda-memory-fraction 1.5", ("--cuda-memory-fraction", "1.5")),
        ("--heartbeat-timeout nan", ("--heartbeat-timeout",)),
        ("--sharded maybe", ("--sharded", "'maybe'")),
        ("--sharded true --num-shard 1", ("--sharded", "--num-shard")),
        ("--max-input-tokens 9 --max-total-tokens 9", ("--max-input-tokens (9)", "below")),
        ("--max-total-tokens 9 --max-batch-total-tokens 8", ("--max-batch-total-tokens (8)",)),
        ("--block-size 12", ("--block-size", "power of two")),
    ],
)
def test_bad_values_are_named(line: str, words: tuple[str, ...]) -> None:
    message = refusal(line)
    assert all(word in message for word in words), message
    assert message.endswith(".") and "\n" not in message


def test_a_bad_variable_is_named_by_its_own_name() -> None:
    assert "NUM_SHARD" in refusal("", NUM_SHARD="two")


def test_neutral_values_are_as_if_absent() -> None:
    assert resolve("--cuda-graphs 0", NGROK="false", LORA_ADAPTERS="").warnings == ()


def test_the_page_has_the_tables_as_they_are() -> None:
    page = (ROOT / "docs/configuration.md").read_text()
    assert filled(page) == page, "run: python -m headgate.launcher.flag_docs docs/configuration.md"
    ours, vllms = page.split("## vLLM's command line")
    assert ours.count("\n| `--") == len(FLAGS)
    assert all(f"`--{flag.name}`" in vllms for flag in VLLM_FLAGS)
    assert all(f"`--{name} {value}`" in vllms for name, value in LIMITS.items())


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "importtime", "-m", "headgate.launcher", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_help_and_version_are_light() -> None:
    shown = run("serve", "--help")
    assert shown.returncode == 0
    text = " ".join(shown.stdout.split())
    assert all(f"--{flag.name}" in text for flag in FLAGS)
    assert "[MAX_BATCH_PREFILL_TOKENS]" in text
    assert run("--version").stdout.startswith("headgate")
    imported = {line.rsplit("|", 1)[-1].strip() for line in shown.stderr.splitlines()}
    assert not imported & {"torch", "transformers", "numpy", "huggingface_hub", "grpc", "asyncio"}


def test_a_misspelt_flag_is_told_the_right_one() -> None:
    ended = run("serve", "--max-total-token", "3")
    assert ended.returncode == 2
    assert "did you mean --max-total-tokens" in ended.stderr
