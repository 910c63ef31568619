"""The table of every flag of `headgate serve`, and of the environment variables without a flag.

It says what exists; it reads neither the command line nor the environment (config.py does).
docs/configuration.md is made from it by `python -m headgate.launcher.flag_docs`.
"""

from __future__ import annotations

from dataclasses import dataclass

from headgate.launcher.flag import Flag, Kind, Policy

_QUANTIZE = (
    "awq",
    "bitsandbytes",
    "bitsandbytes-fp4",
    "bitsandbytes-nf4",
    "compressed-tensors",
    "eetq",
    "exl2",
    "fp8",
    "gptq",
    "marlin",
)
_CHUNKING = "prompts are computed in chunks beside running requests, so there is nothing to balance"

MODEL = (
    Flag(
        "model-id",
        Kind.TEXT,
        "The model: a local checkpoint directory, a hub id, or a .gguf file.",
        default="",
        default_text="the embedded model",
        env_aliases=("HF_MODEL_ID",),
    ),
    Flag(
        "revision",
        Kind.TEXT,
        "Branch, tag or commit of a hub model.",
        default="",
        default_text="main",
        env_aliases=("HF_MODEL_REVISION",),
    ),
    Flag(
        "served-model-name",
        Kind.TEXT,
        "The name that clients see and may put into `model`.",
        default="",
        default_text="the model id",
        own=True,
    ),
    Flag(
        "tokenizer-config-path",
        Kind.PATH,
        "A tokenizer_config.json to use instead of the model's, say for its chat template.",
        default="",
    ),
    Flag(
        "model-module",
        Kind.PATH,
        "A Python file that registers a model architecture of your own.",
        default="",
        own=True,
    ),
    Flag(
        "dtype",
        Kind.TEXT,
        "How weights are stored; on a CPU the arithmetic is float32 whatever the choice.",
        choices=("bfloat16", "float16", "float32"),
        default_text="the checkpoint's, else bfloat16",
    ),
    Flag(
        "quantize",
        Kind.TEXT,
        "The weights' quantisation.",
        choices=_QUANTIZE,
        policy=Policy.REFUSED,
        note="no quantisation is available in this version",
        env_aliases=("HF_MODEL_QUANTIZE",),
    ),
    Flag(
        "kv-cache-dtype",
        Kind.TEXT,
        "How keys and values are stored.",
        choices=("float32", "fp8_e4m3fn", "fp8_e5m2"),
        refused_values=("fp8_e4m3fn", "fp8_e5m2"),
        default_text="float32 on a CPU, the dtype on a GPU",
    ),
    Flag(
        "rope-scaling",
        Kind.TEXT,
        "Stretches rotary positions for prompts beyond the trained length.",
        choices=("linear", "dynamic"),
        default_text="the model's",
    ),
    Flag(
        "rope-factor",
        Kind.NUMBER,
        "By how much; given alone it means linear scaling.",
        minimum=1,
        default_text="1.0 with --rope-scaling",
    ),
    Flag(
        "trust-remote-code",
        Kind.SWITCH,
        "Accepted for TGI's command lines.",
        default=False,
        policy=Policy.NO_OP,
        note="Headgate never runs code from a model repository",
        neutral=(False,),
        env_aliases=("HF_MODEL_TRUST_REMOTE_CODE",),
    ),
    Flag(
        "huggingface-hub-cache",
        Kind.PATH,
        "Where hub models are kept.",
        default="",
        default_text="huggingface_hub's (HF_HUB_CACHE, HF_HOME)",
    ),
    Flag(
        "weights-cache-override",
        Kind.PATH,
        "A directory whose *.safetensors files are used instead of the model's own.",
        default="",
    ),
    Flag(
        "lora-adapters",
        Kind.LIST,
        "Adapters to load at start.",
        default=(),
        policy=Policy.REFUSED,
        note="LoRA adapters are not available in this version",
        neutral=((),),
    ),
    Flag(
        "speculate",
        Kind.INTEGER,
        "Number of draft tokens per step.",
        minimum=0,
        policy=Policy.REFUSED,
        note="speculation is not available in this version",
        neutral=(0,),
    ),
)

SHARDS = (
    Flag(
        "sharded",
        Kind.BOOLEAN,
        "false: one shard unless --num-shard says more; true: at least two.",
        default_text="whatever --num-shard gives",
    ),
    Flag(
        "num-shard",
        Kind.INTEGER,
        "Number of tensor-parallel shard processes, up to the model's attention heads.",
        minimum=1,
        default_text="the number of GPUs, 1 on a CPU",
        env_aliases=("SM_NUM_GPUS",),
    ),
    Flag(
        "threads-per-shard",
        Kind.INTEGER,
        "Threads each shard computes with on a CPU.",
        minimum=1,
        default_text="the cores divided among the shards",
        own=True,
    ),
    Flag(
        "kernels",
        Kind.TEXT,
        "Which implementation of the kernels to use.",
        choices=("auto", "reference", "cpu", "triton"),
        default="auto",
        own=True,
    ),
    Flag(
        "cuda-memory-fraction",
        Kind.NUMBER,
        "Share of each GPU's memory that a shard may use.",
        default=1.0,
        minimum=0.01,
        maximum=1,
    ),
    Flag(
        "shard-uds-path",
        Kind.PATH,
        "Prefix of the shards' sockets; `-{epoch}-{rank}` is appended.",
        default="",
        default_text="inside the private run directory",
    ),
    Flag(
        "master-addr",
        Kind.TEXT,
        "Address of this machine on which the shards of a group meet.",
        default="localhost",
    ),
    Flag(
        "master-port",
        Kind.PORT,
        "Port on which the first group meets; a restarted group takes a fresh one.",
        default_text="a free one",
    ),
    Flag(
        "heartbeat-timeout",
        Kind.NUMBER,
        "Seconds without a sign of life after which a shard counts as hung.",
        default=10.0,
        minimum=1,
        own=True,
    ),
    Flag(
        "startup-timeout",
        Kind.NUMBER,
        "Seconds that loading and warming up may take, the download not counted.",
        default=600.0,
        minimum=1,
        own=True,
    ),
    Flag(
        "cuda-graphs",
        Kind.TEXT,
        "Batch sizes to capture as CUDA graphs.",
        policy=Policy.NO_OP,
        note="CUDA graphs are not captured in this version",
        neutral=("0", ""),
    ),
    Flag(
        "disable-custom-kernels",
        Kind.SWITCH,
        "Accepted for TGI's command lines.",
        default=False,
        policy=Policy.NO_OP,
        note="kernels are chosen by the device (`--kernels reference` takes plain PyTorch)",
        neutral=(False,),
    ),
)

LIMITS = (
    Flag(
        "max-concurrent-requests",
        Kind.INTEGER,
        "Requests running or waiting at a time; one more gets 429.",
        default=128,
        minimum=1,
    ),
    Flag("max-best-of", Kind.INTEGER, "Largest `best_of` of a request.", default=2, minimum=1),
    Flag(
        "max-stop-sequences",
        Kind.INTEGER,
        "Largest number of stop strings of a request.",
        default=4,
        minimum=0,
    ),
    Flag(
        "max-top-n-tokens",
        Kind.INTEGER,
        "Largest `top_n_tokens` of a request.",
        default=5,
        minimum=0,
    ),
    Flag(
        "max-input-tokens",
        Kind.INTEGER,
        "Longest prompt, in tokens.",
        minimum=1,
        default_text="--max-total-tokens - 1",
    ),
    Flag(
        "max-input-length",
        Kind.INTEGER,
        "TGI's old name of --max-input-tokens.",
        minimum=1,
        policy=Policy.ALIAS,
        note="--max-input-tokens",
    ),
    Flag(
        "max-total-tokens",
        Kind.INTEGER,
        "Longest prompt and answer together, in tokens.",
        minimum=2,
        default_text="the model's positions, within the KV memory",
    ),
    Flag(
        "max-batch-prefill-tokens",
        Kind.INTEGER,
        "Most tokens that one step computes.",
        minimum=1,
        default_text="a step of about 150 ms on a CPU (128 to 512), 4096 on a GPU",
    ),
    Flag(
        "max-batch-total-tokens",
        Kind.INTEGER,
        "Size of the KV cache in tokens.",
        minimum=1,
        default_text="1 GiB on a CPU, the free memory on a GPU",
    ),
    Flag(
        "max-batch-size",
        Kind.INTEGER,
        "Most sequences running at a time.",
        minimum=1,
        default_text="--max-concurrent-requests, within the step's tokens",
    ),
    Flag(
        "max-client-batch-size",
        Kind.INTEGER,
        "Most prompts in one /v1/completions call.",
        default=4,
        minimum=1,
    ),
    Flag(
        "block-size",
        Kind.INTEGER,
        "Tokens per block of the KV cache.",
        default=16,
        minimum=1,
        maximum=256,
        own=True,
    ),
    Flag(
        "kv-overcommit",
        Kind.NUMBER,
        "How far admission bets on answers ending early: 0 reserves each request's longest "
        "answer, 1 admits without looking ahead.",
        default=0.1,
        minimum=0,
        maximum=1,
        own=True,
    ),
    Flag(
        "disable-prefix-caching",
        Kind.SWITCH,
        "Don't reuse the KV blocks of earlier prompts.",
        default=False,
        own=True,
    ),
    Flag(
        "enable-prefill-logprobs",
        Kind.SWITCH,
        "Accepted for TGI's command lines.",
        default=False,
        policy=Policy.NO_OP,
        note="the prompt's log-probabilities are there for every request that asks for them",
        neutral=(False,),
    ),
    Flag(
        "waiting-served-ratio",
        Kind.NUMBER,
        "Accepted for TGI's command lines.",
        policy=Policy.NO_OP,
        note=_CHUNKING,
    ),
    Flag(
        "max-waiting-tokens",
        Kind.INTEGER,
        "Accepted for TGI's command lines.",
        policy=Policy.NO_OP,
        note=_CHUNKING,
    ),
    Flag(
        "disable-grammar-support",
        Kind.SWITCH,
        "Accepted for TGI's command lines.",
        default=False,
        policy=Policy.NO_OP,
        note="this version refuses grammars in any case",
        neutral=(False,),
    ),
    Flag(
        "watermark-gamma",
        Kind.NUMBER,
        "Accepted for TGI's command lines.",
        policy=Policy.NO_OP,
        note="this version refuses requests for watermarks",
    ),
    Flag(
        "watermark-delta",
        Kind.NUMBER,
        "Accepted for TGI's command lines.",
        policy=Policy.NO_OP,
        note="this version refuses requests for watermarks",
    ),
)

NETWORK = (
    Flag(
        "hostname",
        Kind.TEXT,
        "Address the HTTP port listens on.",
        default="0.0.0.0",
    ),
    Flag("port", Kind.PORT, "HTTP port; 0 takes a free one.", default=3000, short="p"),
    Flag(
        "grpc-port",
        Kind.PORT,
        "Port of the public gRPC service.",
        default_text="the HTTP port + 1",
        own=True,
    ),
    Flag(
        "grpc-hostname",
        Kind.TEXT,
        "Address the gRPC port listens on.",
        default="127.0.0.1",
        own=True,
    ),
    Flag(
        "gateway-workers",
        Kind.INTEGER,
        "Number of HTTP gateway processes.",
        default=1,
        minimum=1,
        maximum=64,
        own=True,
    ),
    Flag(
        "api-key",
        Kind.TEXT,
        "Key that clients must send as `Authorization: Bearer`, on HTTP and gRPC.",
        default="",
    ),
    Flag(
        "cors-allow-origin",
        Kind.LIST,
        "Origin that browsers may call from; repeatable.",
        default=(),
        default_text="any",
    ),
    Flag(
        "payload-limit",
        Kind.INTEGER,
        "Largest request body in bytes.",
        default=2_000_000,
        minimum=1,
    ),
    Flag(
        "validation-workers",
        Kind.INTEGER,
        "Tokeniser threads of the router.",
        default=2,
        minimum=1,
    ),
    Flag(
        "strict",
        Kind.SWITCH,
        "Refuse requests that hold a field unknown to the server, with 422.",
        default=False,
        own=True,
    ),
    Flag(
        "graceful-termination-timeout",
        Kind.NUMBER,
        "Seconds that running requests may take after a stop signal.",
        default=90.0,
        minimum=0,
        short="g",
    ),
    Flag(
        "prometheus-port",
        Kind.PORT,
        "Accepted for TGI's command lines.",
        policy=Policy.NO_OP,
        note="metrics are at /metrics on the HTTP port, and nothing listens on a second one",
    ),
    Flag(
        "ngrok",
        Kind.SWITCH,
        "Tunnel through ngrok.",
        default=False,
        policy=Policy.REFUSED,
        note="there is no ngrok tunnel; run one beside the server",
        neutral=(False,),
    ),
    Flag(
        "ngrok-authtoken",
        Kind.TEXT,
        "Token of an ngrok account.",
        policy=Policy.REFUSED,
        note="there is no ngrok tunnel; run one beside the server",
    ),
    Flag(
        "ngrok-edge",
        Kind.TEXT,
        "Edge of an ngrok account.",
        policy=Policy.REFUSED,
        note="there is no ngrok tunnel; run one beside the server",
    ),
)

LOGS = (
    Flag("json-output", Kind.SWITCH, "Write the log as one JSON object a line.", default=False),
    Flag(
        "log-prompts",
        Kind.SWITCH,
        "Write prompts and answers into the log.",
        default=False,
        own=True,
    ),
    Flag(
        "otlp-endpoint",
        Kind.TEXT,
        "Collector for OpenTelemetry traces.",
        policy=Policy.REFUSED,
        note="traces are not exported in this version",
    ),
    Flag(
        "otlp-service-name",
        Kind.TEXT,
        "Accepted for TGI's command lines.",
        policy=Policy.NO_OP,
        note="traces are not exported in this version",
    ),
    Flag(
        "usage-stats",
        Kind.TEXT,
        "Accepted for TGI's command lines.",
        choices=("on", "off", "no-stack"),
        policy=Policy.NO_OP,
        note="Headgate never sends usage statistics",
    ),
    Flag(
        "env",
        Kind.SWITCH,
        "Print versions and hardware before starting.",
        default=False,
        short="e",
        has_env=False,
    ),
)

GROUPS: tuple[tuple[str, tuple[Flag, ...]], ...] = (
    ("Model", MODEL),
    ("Shards", SHARDS),
    ("Limits and memory", LIMITS),
    ("Network", NETWORK),
    ("Logs", LOGS),
)
FLAGS: tuple[Flag, ...] = tuple(flag for _, group in GROUPS for flag in group)
BY_KEY: dict[str, Flag] = {flag.key: flag for flag in FLAGS}


@dataclass(frozen=True, slots=True)
class Variable:
    """An environment variable that has no flag."""

    name: str
    help: str  # one sentence
    policy: Policy = Policy.WORKS
    neutral: tuple[str, ...] = ()  # NO_OP: values that deserve no warning


VARIABLES: tuple[Variable, ...] = (
    Variable("LOG_LEVEL", "Least level logged: trace, debug, info (the default), warn or error."),
    Variable("LOG_COLORIZE", "0: no colours in the log; 1: colours even where it is not a terminal."),
    Variable("NO_COLOR", "Set to anything: no colours in the log."),
    Variable("HF_TOKEN", "Access token for hub models."),
    Variable("HF_API_TOKEN", "TGI's older name of HF_TOKEN, read where that is not set."),
    Variable("HF_ENDPOINT", "Address of the hub."),
    Variable("HF_HOME", "Directory of huggingface_hub's files, the model cache among them."),
    Variable("HF_HUB_CACHE", "Directory of the hub models, below --huggingface-hub-cache."),
    Variable("HF_HUB_OFFLINE", "1: take hub models from the cache only."),
    Variable("HF_HUB_USER_AGENT_ORIGIN", "Passed to the hub in the user agent."),
    Variable("COMPUTE_TYPE", "The text of the `x-compute-type` response header."),
    Variable("PREFIX_CACHING", "0: as --disable-prefix-caching."),
    Variable("CUDA_VISIBLE_DEVICES", "The GPUs to use; empty: run on the CPU."),
    Variable("NVIDIA_VISIBLE_DEVICES", "The GPUs of a container, read where CUDA_VISIBLE_DEVICES is not set."),
    Variable("XDG_CACHE_HOME", "Directory of converted models, in `headgate` below it (default ~/.cache)."),
    Variable(
        "ATTENTION",
        "TGI's attention back end; Headgate has one, chosen by --kernels.",
        Policy.NO_OP,
    ),
    Variable("USE_FLASH_ATTENTION", "As ATTENTION.", Policy.NO_OP, ("1", "true", "True")),
    Variable("PREFILL_CHUNKING", "Prompts are always computed in chunks.", Policy.NO_OP, ("1", "true")),
    Variable("TGI_WIGGLE_ROOM", "Use --cuda-memory-fraction.", Policy.NO_OP),
    Variable(
        "HF_HUB_ENABLE_HF_TRANSFER",
        "huggingface_hub chooses the way of transfer itself.",
        Policy.NO_OP,
        ("0", "1"),
    ),
)
