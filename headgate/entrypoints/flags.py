"""The table of vLLM's server flags: each is a flag of `headgate serve`, of no effect, or refused.

docs/configuration.md is made from it too. What `LLM` takes under the same names is decided in
llm_arguments.py; how a command line is read, in command_line.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from headgate.launcher.flag import Policy
from headgate.llm_arguments import MEANINGLESS, ONLY, SERVE_FLAGS
from headgate.speculative_config import NGRAM

LOOKUP_NOTE = "the number of draft tokens says how long a run of tokens is looked up"
_ITS_OWN = "it is about how vLLM does its work"


@dataclass(frozen=True, slots=True)
class VllmFlag:
    """One row."""

    name: str  # without the dashes
    policy: Policy
    note: str  # WORKS: the flag of `headgate serve`; NO_OP: why it has none; REFUSED: why
    neutral: tuple[str, ...] = ()  # values as good as absent
    switch: bool = False  # takes no value; --no-NAME is its opposite
    short: str = ""  # with its dashes
    several: bool = False  # takes values up to the next flag


_SHORT = {"tensor-parallel-size": "-tp", "pipeline-parallel-size": "-pp", "quantization": "-q",
          "data-parallel-size": "-dp", "compilation-config": "-O",
          "speculative-config": "-sc"}  # fmt: skip

# Of no effect, beside what llm_arguments.py names: (names, why).
_NO_EFFECT: tuple[tuple[str, str], ...] = (
    (
        "device use-tqdm-on-load max-parallel-loading-workers enable-sleep-mode model-impl "
        "preemption-mode scheduler-delay-factor disable-frontend-multiprocessing worker-use-ray "
        "engine-use-ray ray-workers-use-nsight disable-cascade-attn disable-async-output-proc "
        "prefix-caching-hash-algo long-prefill-token-threshold max-long-partial-prefills "
        "num-lookahead-slots multi-step-stream-outputs stream-interval num-gpu-blocks-override "
        "disable-hybrid-kv-cache-manager safetensors-load-strategy tokenizer-pool-size "
        "tokenizer-pool-type guided-decoding-backend structured-outputs-config",
        _ITS_OWN,
    ),
    (
        "uvicorn-log-level disable-uvicorn-access-log max-log-len enable-log-requests "
        "enable-log-outputs log-level",
        "LOG_LEVEL sets the log's level, --log-prompts writes prompts and answers",
    ),
    ("enable-request-id-headers", "every answer has `x-request-id`"),
    ("seed", "give requests a `seed` of their own"),
    ("response-role", "answers are the assistant's"),
    ("allowed-methods allowed-headers", "browsers may use all methods and headers of the routes"),
    ("enable-server-load-tracking show-hidden-metrics-for-version", "see /metrics"),
    ("disable-fastapi-docs", "there is no FastAPI"),
    ("enable-auto-tool-choice", "tools need no flag"),
    ("ngram-prompt-lookup-max ngram-prompt-lookup-min", LOOKUP_NOTE),
)
_SWITCH_NAMES = (
    "trust-remote-code skip-tokenizer-init enable-lora enforce-eager disable-log-stats "
    "disable-custom-all-reduce enable-chunked-prefill async-scheduling use-v2-block-manager "
    "disable-log-requests use-tqdm-on-load enable-sleep-mode worker-use-ray engine-use-ray "
    "disable-frontend-multiprocessing ray-workers-use-nsight disable-cascade-attn "
    "disable-async-output-proc multi-step-stream-outputs disable-hybrid-kv-cache-manager "
    "disable-uvicorn-access-log enable-log-requests enable-log-outputs "
    "enable-request-id-headers enable-server-load-tracking disable-fastapi-docs "
    "enable-auto-tool-choice enable-ssl-refresh allow-credentials enable-prompt-embeds "
    "disable-sliding-window enable-expert-parallel calculate-kv-scales fully-sharded-loras "
    "return-tokens-as-token-ids enable-force-include-usage headless"
)
_SWITCHES = frozenset(_SWITCH_NAMES.split())
_TLS = "TLS is for a proxy in front of the server"
# Refused but for the values in brackets, beside what llm_arguments.py names.
_REFUSED: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("ssl-keyfile ssl-certfile ssl-ca-certs enable-ssl-refresh", _TLS, ()),
    ("ssl-cert-reqs", _TLS, ("0",)),
    ("hf-token", "set HF_TOKEN in the environment", ()),
    ("config", "give the flags themselves", ()),
    ("root-path", "the routes have no prefix", ("",)),
    ("uds", "HTTP is answered on a port", ()),
    ("middleware", "the application takes none", ()),
    ("allow-credentials", "credentials travel in `authorization`", ()),
    ("chat-template-content-format", "contents reach the template as strings", ("auto", "string")),
    ("tokenizer", "the model's own is used", ()),
    ("hf-config-path", "the model's own config.json is used", ()),
    ("code-revision", "no code of a model repository is run", ()),
    ("lora-modules prompt-adapters max-loras max-lora-rank max-cpu-loras lora-dtype "
     "fully-sharded-loras", "adapters are not available in this version", ()),
    ("speculative-model spec-model spec-method", "drafts come from n-grams alone (`ngram`)", NGRAM),
    ("disable-sliding-window enable-prompt-embeds override-generation-config "
     "override-attention-dtype calculate-kv-scales logits-processor-pattern io-processor-plugin "
     "model-loader-extra-config rope-theta", "it is not available in this version", ()),
    ("tool-parser-plugin reasoning-parser-plugin worker-cls worker-extension-cls scheduler-cls",
     "no code of yours is run in the server", ()),
    ("enable-expert-parallel decode-context-parallel-size data-parallel-rank "
     "data-parallel-size-local data-parallel-address api-server-count headless",
     "shards are tensor-parallel on one machine; --gateway-workers gives more HTTP processes", ()),
    ("return-tokens-as-token-ids enable-force-include-usage", "answers have OpenAI's shapes", ()),
    ("kv-cache-memory-bytes", "--max-batch-total-tokens gives the size in tokens", ()),
    ("kv-transfer-config kv-events-config", "KV memory is not shared between servers", ()),
    ("otlp-traces-endpoint collect-detailed-traces", "traces are not exported", ()),
)  # fmt: skip
# Flags of the server alone that work.
_OF_THE_SERVER = (
    VllmFlag("host", Policy.WORKS, "--hostname"),
    VllmFlag("port", Policy.WORKS, "--port"),
    VllmFlag("api-key", Policy.WORKS, "--api-key", several=True),
    VllmFlag("allowed-origins", Policy.WORKS, "--cors-allow-origin", ('["*"]',)),
    VllmFlag("dtype", Policy.WORKS, "--dtype", ("auto",)),
    VllmFlag("chat-template", Policy.WORKS, "--tokenizer-config-path"),
    VllmFlag("tool-call-parser", Policy.WORKS, "--tool-call-parser"),
    VllmFlag("reasoning-parser", Policy.WORKS, "--reasoning-parser"),
    VllmFlag("num-speculative-tokens", Policy.WORKS, "--speculate"),
    VllmFlag("spec-tokens", Policy.WORKS, "--speculate"),
    VllmFlag("enable-prefix-caching", Policy.WORKS, "--disable-prefix-caching", switch=True),
)


def _rows() -> Iterator[VllmFlag]:
    yield from _OF_THE_SERVER
    for argument, (flag, unset) in SERVE_FLAGS.items():
        name = argument.replace("_", "-")
        several = name == "served-model-name"
        yield _row(name, Policy.WORKS, f"--{flag}", tuple(map(_text, unset)), several)
    for argument in MEANINGLESS:
        yield _row(argument.replace("_", "-"), Policy.NO_OP, _ITS_OWN)
    for names, why in _NO_EFFECT:
        for name in names.split():
            yield _row(name, Policy.NO_OP, why)
    for argument, neutral in ONLY.items():
        why = "it is not available in this version"
        yield _row(argument.replace("_", "-"), Policy.REFUSED, why, tuple(map(_text, neutral)))
    for names, why, values in _REFUSED:
        for name in names.split():
            yield _row(name, Policy.REFUSED, why, values)


def _row(
    name: str,
    policy: Policy,
    note: str,
    neutral: tuple[str, ...] = (),
    several: bool = False,
) -> VllmFlag:
    return VllmFlag(name, policy, note, neutral, name in _SWITCHES, _SHORT.get(name, ""), several)


def _text(value: object) -> str:
    """A value of `LLM`'s as a command line has it."""
    return "null" if value is None else str(value)


VLLM_FLAGS: tuple[VllmFlag, ...] = tuple(_rows())
