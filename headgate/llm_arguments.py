"""The arguments of vLLM's `LLM` as flags of `headgate serve`.

An argument that would change what is computed and is not served is refused by name; one about how
vLLM does its work is taken and has no meaning here. The flags of vLLM's server have the same names
and share these tables (entrypoints/flags.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headgate.speculative_config import draft_tokens

DTYPES = {"auto": "", "half": "float16", "float": "float32"}
KV_CACHE_DTYPES = {"fp8": "fp8_e4m3fn", "fp8_e4m3": "fp8_e4m3fn"}
STOP_TEXTS = 1024  # vLLM has no limit
BEST_OF = 1024  # beside the limit on all answers at once

# argument: (flag, values that leave the choice to the server)
SERVE_FLAGS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "model": ("model-id", ("",)),
    "revision": ("revision", (None,)),
    "served_model_name": ("served-model-name", (None,)),
    "tensor_parallel_size": ("num-shard", ()),
    "quantization": ("quantize", (None,)),
    "kv_cache_dtype": ("kv-cache-dtype", (None, "auto")),
    "gpu_memory_utilization": ("cuda-memory-fraction", (None,)),
    "max_model_len": ("max-total-tokens", (None, -1, "auto")),
    "max_num_seqs": ("max-batch-size", (None,)),
    "max_num_batched_tokens": ("max-batch-prefill-tokens", (None,)),
    "block_size": ("block-size", (None,)),
    "max_logprobs": ("max-top-n-tokens", ()),
    "speculative_config": ("speculate", (None, {})),
    "download_dir": ("huggingface-hub-cache", (None,)),
    "trust_remote_code": ("trust-remote-code", (False, None)),
}
# What is refused but for these values.
ONLY: dict[str, tuple[Any, ...]] = {
    "tokenizer_revision": (None,),
    "tokenizer_mode": ("auto", "fast"),
    "skip_tokenizer_init": (False,),
    "runner": ("auto", "generate"),
    "task": (None, "auto", "generate"),
    "convert": ("auto", "none"),
    "load_format": ("auto", "safetensors"),
    "pipeline_parallel_size": (1,),
    "data_parallel_size": (1,),
    "cpu_offload_gb": (0,),
    "hf_overrides": (None, {}),
    "rope_scaling": (None, {}),
    "enable_lora": (None, False),
    "limit_mm_per_prompt": (None, {}),
    "logits_processors": (None, []),
    "scheduling_policy": ("fcfs",),
    "generation_config": ("auto", "vllm"),
}
# How vLLM does its work: no difference here whatever they say.
MEANINGLESS = (
    "enforce_eager", "swap_space", "disable_log_stats", "disable_custom_all_reduce",
    "enable_chunked_prefill", "distributed_executor_backend", "async_scheduling",
    "compilation_config", "max_seq_len_to_capture", "use_v2_block_manager", "disable_log_requests",
    "max_num_partial_prefills", "num_scheduler_steps",
)  # fmt: skip


def check_others(others: Mapping[str, Any]) -> None:
    """Arguments that `LLM` does not list itself. Raises TypeError for unknown, ValueError for
    refused ones."""
    known = {*ONLY, *MEANINGLESS}
    unknown = [name for name in others if name not in known]
    if unknown:
        raise TypeError(f"LLM() got unexpected arguments: {', '.join(unknown)}")
    for name, neutral in ONLY.items():
        if name in others and others[name] not in neutral:
            raise ValueError(f"`{name}` = {others[name]!r} is not supported")


def to_flags(arguments: Mapping[str, Any]) -> list[str]:
    """Flags for the arguments that `LLM` lists itself, by name. Raises ValueError."""
    model, tokenizer = arguments["model"], arguments["tokenizer"]
    if tokenizer not in (None, model):
        raise ValueError(f"`tokenizer` = {tokenizer!r} is not supported: the model's own is used")
    flags = [f"--max-stop-sequences={STOP_TEXTS}", f"--max-best-of={BEST_OF}"]
    for name, (flag, unset) in SERVE_FLAGS.items():
        value = arguments[name]
        if value in unset:
            continue
        if name == "kv_cache_dtype":
            value = KV_CACHE_DTYPES.get(value, value)
        if name == "speculative_config":
            value = draft_tokens(value, "`speculative_config`")
        flags.append(f"--{flag}" if value is True else f"--{flag}={value}")
    dtype = str(arguments["dtype"]).removeprefix("torch.")
    dtype = DTYPES.get(dtype, dtype)
    if dtype:
        flags.append(f"--dtype={dtype}")
    if arguments["enable_prefix_caching"] is False:
        flags.append("--disable-prefix-caching")
    seqs = arguments["max_num_seqs"]
    if seqs is not None:  # as many again wait in the router, ready to run
        flags.append(f"--max-concurrent-requests={2 * seqs}")
    return flags
