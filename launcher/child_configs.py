"""What the launcher writes for its children: their JSON files and their environment.

The keys are the fields of ShardConfig, RouterConfig and GatewayConfig, which the launcher does not
import; tests/unit/test_child_configs.py loads each file with its dataclass.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from headgate.launcher.autosize import Sizes
from headgate.launcher.config import LauncherConfig
from headgate.launcher.hardware import Hardware
from headgate.launcher.log_output import log_level
from headgate.launcher.model_files import ModelFiles
from headgate.launcher.run_directory import RunDirectory

GATEWAY_SHUTDOWN_SECONDS = 5.0  # for writing the last answers, after all requests have ended

# gRPC's event engine hands each message from thread to thread. Without it the thread that polls
# reads and writes by itself: half of the wake-ups, a quarter less CPU for a message (gRPC 1.85).
_GRPC_EXPERIMENTS = "-event_engine_client,-event_engine_listener"


def shard_config(
    config: LauncherConfig, sizes: Sizes, files: ModelFiles, run: RunDirectory
) -> dict[str, Any]:
    """ShardConfig: the same file for all ranks and epochs."""
    return {
        "model_path": files.path,
        "model_module": os.path.abspath(config.model_module) if config.model_module else "",
        "dtype": sizes.dtype,
        "quantize": sizes.quantize,
        "matmul_precision": sizes.matmul_precision,
        "device": sizes.device,
        "kernels": "" if config.kernels == "auto" else config.kernels,
        "batch_invariant": config.batch_invariant,
        "cuda_graphs": config.cuda_graphs,
        "num_threads": sizes.threads_per_shard,
        "block_size": sizes.block_size,
        "num_blocks": sizes.num_blocks,
        "kv_cache_dtype": sizes.kv_cache_dtype,
        "max_batch_prefill_tokens": sizes.max_batch_prefill_tokens,
        "max_batch_size": sizes.max_batch_size,
        "max_total_tokens": sizes.max_total_tokens,
        "addresses": [
            run.shard_address(config.shard_uds_path, rank) for rank in range(sizes.num_shard)
        ],
        "rope_scaling": config.rope_scaling or "",
        "rope_factor": config.rope_factor or 0.0,
        "cuda_memory_fraction": config.cuda_memory_fraction,
        "process_group_timeout": config.startup_timeout,
        "null": config.null_shard,
    }


def router_config(
    config: LauncherConfig, sizes: Sizes, files: ModelFiles, run: RunDirectory, grpc_port: int
) -> dict[str, Any]:
    """RouterConfig."""
    tokenizer_config = config.tokenizer_config_path
    return {
        "model_path": files.path,
        "model_id": files.model_id,
        "model_sha": files.sha,
        "revision": config.revision,
        "served_model_name": config.served_model_name,
        "tokenizer_config_path": os.path.abspath(tokenizer_config) if tokenizer_config else "",
        "control_address": str(run.control_socket),
        "gateway_address": f"unix:{run.router_socket}",
        "grpc_host": config.grpc_hostname,
        "grpc_port": grpc_port,
        "api_key": config.api_key,
        "num_shards": sizes.num_shard,
        "dtype": sizes.dtype,
        "quantize": sizes.quantize,
        "device": sizes.device,
        "max_concurrent_requests": config.max_concurrent_requests,
        "max_best_of": config.max_best_of,
        "max_stop_sequences": config.max_stop_sequences,
        "max_top_n_tokens": config.max_top_n_tokens,
        "max_input_tokens": sizes.max_input_tokens,
        "max_total_tokens": sizes.max_total_tokens,
        "max_batch_prefill_tokens": sizes.max_batch_prefill_tokens,
        "max_batch_size": sizes.max_batch_size,
        "max_client_batch_size": config.max_client_batch_size,
        "validation_workers": config.validation_workers,
        "block_size": sizes.block_size,
        "kv_overcommit": config.kv_overcommit,
        "speculate": sizes.speculate,
        "pooling": config.pooling,
        "watermark_gamma": config.watermark_gamma,
        "watermark_delta": config.watermark_delta,
        "prefix_caching": not config.disable_prefix_caching,
        "grammar_support": not config.disable_grammar_support,
        "heartbeat_timeout": config.heartbeat_timeout,
        "log_prompts": config.log_prompts,
    }


def gateway_config(
    config: LauncherConfig, hardware: Hardware, run: RunDirectory, port: int
) -> dict[str, Any]:
    """GatewayConfig. It is written before the model is known."""
    return {
        "router_address": f"unix:{run.router_socket}",
        "status_path": str(run.status_file),
        "api_key": config.api_key,
        "cors_allow_origin": list(config.cors_allow_origin),
        "payload_limit": config.payload_limit,
        "max_client_batch_size": config.max_client_batch_size,
        "vllm_stream_nul": config.vllm_stream_delimiter == "nul",
        "strict": config.strict,
        "tool_call_parser": config.tool_call_parser,
        "reasoning_parser": config.reasoning_parser,
        "compute_type": config.compute_type or _compute_type(config, hardware),
        "predict_route": config.predict_route,
        "health_route": config.health_route,
        "shutdown_timeout": GATEWAY_SHUTDOWN_SECONDS,
        "hostname": config.hostname,
        "port": port,
    }


def _compute_type(config: LauncherConfig, hardware: Hardware) -> str:
    """As TGI wrote it: "2-nvidia-a10g"."""
    if not hardware.gpus:
        return "cpu"
    count = config.num_shard or len(hardware.gpus)
    return f"{count}-{hardware.gpus[0].name.lower().replace(' ', '-')}"


def child_environment(
    inherited: Mapping[str, str], config: LauncherConfig, **own: str
) -> dict[str, str]:
    """The launcher's environment for a child, with `own` variables on top."""
    environment = dict(inherited)
    environment["LOG_LEVEL"] = log_level(environment)
    environment.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    # torch's idle threads would spin on the cores that the kernels' and the router's threads need.
    environment.setdefault("OMP_WAIT_POLICY", "passive")
    environment.setdefault("GRPC_EXPERIMENTS", _GRPC_EXPERIMENTS)
    if not environment.get("HF_TOKEN") and environment.get("HF_API_TOKEN"):
        environment["HF_TOKEN"] = environment["HF_API_TOKEN"]
    if config.huggingface_hub_cache:
        environment["HF_HUB_CACHE"] = config.huggingface_hub_cache
    # Settings of the launcher under generic names, which libraries may take for their own.
    for name in ("HOSTNAME", "PORT", "API_KEY"):
        environment.pop(name, None)
    environment.update(own)
    return environment


def shard_environment(
    rank: int, world_size: int, epoch: int, master: tuple[str, int]
) -> dict[str, str]:
    """What tells the shards of a group apart. `master`: where they meet."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": master[0],
        "MASTER_PORT": str(master[1]),
        "HEADGATE_EPOCH": str(epoch),
    }
