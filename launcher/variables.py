"""The table of environment variables that have no flag; flags.py has those that do."""

from __future__ import annotations

from dataclasses import dataclass

from headgate.launcher.flag import Policy


@dataclass(frozen=True, slots=True)
class Variable:
    """An environment variable that has no flag."""

    name: str
    help: str  # one sentence
    policy: Policy = Policy.WORKS
    neutral: tuple[str, ...] = ()  # NO_OP: values that deserve no warning


VARIABLES: tuple[Variable, ...] = (
    Variable("LOG_LEVEL", "Least level logged: trace, debug, info (the default), warn or error."),
    Variable(
        "LOG_COLORIZE", "0: no colours in the log; 1: colours even where it is not a terminal."
    ),
    Variable("NO_COLOR", "Set to anything: no colours in the log."),
    Variable("HF_TOKEN", "Access token for hub models."),
    Variable("HF_API_TOKEN", "TGI's older name of HF_TOKEN, read where that is not set."),
    Variable("HF_ENDPOINT", "Address of the hub."),
    Variable("HF_HOME", "Directory of huggingface_hub's files, the model cache among them."),
    Variable("HF_HUB_CACHE", "Directory of the hub models, below --huggingface-hub-cache."),
    Variable("HF_HUB_OFFLINE", "1: take hub models from the cache only."),
    Variable("HF_HUB_USER_AGENT_ORIGIN", "Passed to the hub in the user agent."),
    Variable("COMPUTE_TYPE", "The text of the `x-compute-type` response header."),
    Variable("AIP_PREDICT_ROUTE", "Vertex AI's: a second path of `/vertex`."),
    Variable("AIP_HEALTH_ROUTE", "Vertex AI's: a second path of `/health`."),
    Variable("PREFIX_CACHING", "0: as --disable-prefix-caching."),
    Variable("CUDA_VISIBLE_DEVICES", "The GPUs to use; empty: run on the CPU."),
    Variable(
        "NVIDIA_VISIBLE_DEVICES",
        "The GPUs of a container, read where CUDA_VISIBLE_DEVICES is not set.",
    ),
    Variable("HEADGATE_CACHE", "Directory of converted models."),
    Variable(
        "HEADGATE_CPU_ISA",
        "avx512, avx2 or generic: instructions for the CPU kernels (default: the best there are).",
    ),
    Variable(
        "HEADGATE_STEP_TRACE",
        "A file: each shard writes there, with its rank appended, when each step began and ended.",
    ),
    Variable("XDG_CACHE_HOME", "Else they are in `headgate` below this one (default ~/.cache)."),
    Variable(
        "ATTENTION",
        "TGI's attention back end; Headgate has one, chosen by --kernels.",
        Policy.NO_OP,
    ),
    Variable("USE_FLASH_ATTENTION", "As ATTENTION.", Policy.NO_OP, ("1", "true", "True")),
    Variable(
        "PREFILL_CHUNKING", "Prompts are always computed in chunks.", Policy.NO_OP, ("1", "true")
    ),
    Variable("TGI_WIGGLE_ROOM", "Use --cuda-memory-fraction.", Policy.NO_OP),
    Variable(
        "HF_HUB_ENABLE_HF_TRANSFER",
        "huggingface_hub chooses the way of transfer itself.",
        Policy.NO_OP,
        ("0", "1"),
    ),
)
