"""The JSON files that the launcher writes are what each child's dataclass reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from headgate.config_file import load_config
from headgate.launcher.autosize import work_out_sizes
from headgate.launcher.child_configs import (
    child_environment,
    gateway_config,
    router_config,
    shard_config,
)
from headgate.launcher.cli import parse_serve
from headgate.launcher.hardware import Hardware
from headgate.launcher.model_facts import read_model_facts
from headgate.launcher.model_files import ModelFiles
from headgate.launcher.run_directory import RunDirectory
from headgate.router.config import RouterConfig
from headgate.router.gateway.config import GatewayConfig
from headgate.shard.config import ShardConfig, ShardIdentity
from tests.unit.launcher_model import write_model

MACHINE = Hardware(cores=2, memory_available=8 << 30, memory_limit=8 << 30, shm_free=1 << 30)


@pytest.fixture
def loaded(tmp_path: Path) -> Any:
    """A function from a command line to the three configurations as the children read them."""
    run = RunDirectory()
    model = write_model(tmp_path / "model")

    def load(line: str) -> tuple[ShardConfig, RouterConfig, GatewayConfig]:
        config = parse_serve(line.split(), {})
        sizes = work_out_sizes(read_model_facts(model), config, MACHINE)
        files = ModelFiles(str(model), "org/model", "abc")
        shard = run.write_config("shard", shard_config(config, sizes, files, run))
        router = run.write_config("router", router_config(config, sizes, files, run, 3001))
        gateway = run.write_config("gateway", gateway_config(config, MACHINE, run, 3000))
        assert all(path.stat().st_mode & 0o777 == 0o600 for path in (shard, router, gateway))
        assert run.path.stat().st_mode & 0o777 == 0o700
        return (
            load_config(ShardConfig, shard),
            load_config(RouterConfig, router),
            load_config(GatewayConfig, gateway),
        )

    yield load
    run.remove()
    assert not run.path.exists()


def test_defaults(loaded: Any) -> None:
    shard, router, gateway = loaded("")
    assert shard.kernels == "" and shard.dtype == "float32" and shard.num_blocks > 0
    assert router.num_shards == 1 and router.prefix_caching and router.model_sha == "abc"
    assert gateway.compute_type == "cpu" and gateway.router_address == router.gateway_address
    assert (router.max_total_tokens, router.block_size) == (64, shard.block_size)
    assert router.speculate == 11


def test_flags_reach_the_children(loaded: Any) -> None:
    shard, router, gateway = loaded(
        "--num-shard 3 --kernels reference --max-batch-size 5 --rope-factor 2 --block-size 8 "
        "--disable-grammar-support --disable-prefix-caching --kv-overcommit 0.5 "
        "--heartbeat-timeout 3 --api-key k "
        "--served-model-name s --cors-allow-origin https://a --strict --payload-limit 10 "
        "--log-prompts --threads-per-shard 1 --master-addr 127.0.0.1"
    )
    assert len(shard.addresses) == 3 and shard.num_threads == 1 and shard.kernels == "reference"
    assert (shard.rope_scaling, shard.rope_factor, shard.block_size) == ("linear", 2, 8)
    assert shard.max_total_tokens == router.max_total_tokens == 128
    assert not router.grammar_support and not router.prefix_caching
    assert (router.kv_overcommit, router.heartbeat_timeout, router.max_batch_size) == (0.5, 3, 5)
    assert not router.prefix_caching and router.log_prompts and router.served_model_name == "s"
    assert router.api_key == gateway.api_key == "k"
    assert gateway.strict and gateway.payload_limit == 10
    assert gateway.cors_allow_origin == ("https://a",)


def test_draft_tokens_reach_the_router(loaded: Any) -> None:
    assert [loaded(f"--speculate {number}")[1].speculate for number in (0, 5)] == [0, 5]


def test_a_null_shard_needs_neither_gpu_nor_memory(loaded: Any) -> None:
    shard, _, _ = loaded("--null-shard --max-batch-total-tokens 100000000")
    assert shard.null and shard.device == "cpu"
    assert shard.num_blocks * shard.block_size == 100_000_000


def test_each_shard_finds_its_own_address(loaded: Any, tmp_path: Path) -> None:
    shard, _, _ = loaded("--num-shard 2")
    addresses = [ShardIdentity(rank, 2, 7).address(shard) for rank in range(2)]
    assert [Path(address).name for address in addresses] == ["shard-7-0.sock", "shard-7-1.sock"]
    shard, _, _ = loaded(f"--shard-uds-path {tmp_path}/some/prefix")
    assert ShardIdentity(0, 1, 2).address(shard) == f"unix:{tmp_path}/some/prefix-2-0"


def test_the_environment_of_children() -> None:
    config = parse_serve(["--huggingface-hub-cache", "/cache"], {})
    inherited = {"PORT": "80", "HOSTNAME": "pod", "HF_API_TOKEN": "t", "LOG_LEVEL": "debug,x=1"}
    found = child_environment(inherited, config, RANK="1")
    assert "PORT" not in found and "HOSTNAME" not in found
    assert (found["HF_TOKEN"], found["HF_HUB_CACHE"]) == ("t", "/cache")
    assert (found["LOG_LEVEL"], found["RANK"]) == ("debug", "1")
    assert "event_engine" in found["GRPC_EXPERIMENTS"]
    assert child_environment({"GRPC_EXPERIMENTS": ""}, config)["GRPC_EXPERIMENTS"] == ""
