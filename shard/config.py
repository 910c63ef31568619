"""What a shard process is told: its JSON file and its environment. It reads no model files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from headgate.config_file import ConfigError

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
KV_DTYPES = {
    **DTYPES,
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
    "int8": torch.int8,  # with scales, see headgate.kernels.int8_cache
}
_SIZES = re.compile(r" *[0-9]+ *(, *[0-9]+ *)*")
DEVICES = ("cpu", "cuda")
MATMUL_PRECISIONS = ("highest", "medium")


@dataclass(frozen=True, slots=True)
class ShardConfig:
    """The same for all ranks of a group; written by the launcher."""

    model_path: str  # a local checkpoint directory
    dtype: str  # how weights are stored
    device: str
    num_threads: int  # of this process's tensor operations
    max_batch_prefill_tokens: int  # tokens of the largest step
    max_batch_size: int  # rows held at once; more only cost memory
    max_total_tokens: int  # prompt and output of one row
    addresses: tuple[str, ...]  # one per rank; "{epoch}" in it is replaced
    model_module: str = ""  # Python file that registers another architecture
    kernels: str = ""  # "": the best for the device
    cuda_graphs: str = ""  # batch sizes to capture, "1,2,4"; "": those that occur; "0": none
    quantize: str = ""  # a kind of headgate.kernels.quantised; "": none
    batch_invariant: bool = False  # a row's bits don't depend on the batch, at whatever cost
    matmul_precision: str = "highest"  # "medium": products' inputs are rounded to bfloat16
    block_size: int = 16  # positions per KV block
    num_blocks: int = 0  # 0: as many as fit, found out at warm-up (cuda)
    kv_cache_dtype: str = "float32"
    rope_scaling: str = ""  # "": as the checkpoint says
    rope_factor: float = 0.0
    cuda_memory_fraction: float = 1.0  # of the device's memory
    process_group_timeout: float = 600.0  # seconds
    null: bool = False  # answer at once, without a model (null_runner.py)

    def __post_init__(self) -> None:
        """Raises ConfigError with one sentence about the first value that cannot be."""
        for name, value, known in (
            ("dtype", self.dtype, DTYPES),
            ("kv_cache_dtype", self.kv_cache_dtype, KV_DTYPES),
            ("device", self.device, DEVICES),
            ("matmul_precision", self.matmul_precision, MATMUL_PRECISIONS),
        ):
            if value not in known:
                raise ConfigError(f"{name} is {value!r}; it must be one of {', '.join(known)}")
        positive = (
            "num_threads",
            "block_size",
            "max_batch_prefill_tokens",
            "max_batch_size",
            "max_total_tokens",
            "process_group_timeout",
        )
        for name in positive:
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be greater than 0")
        if self.num_blocks < 0 or (self.num_blocks == 0 and self.device == "cpu"):
            raise ConfigError("num_blocks must be greater than 0 on a CPU")
        if self.cuda_graphs and not _SIZES.fullmatch(self.cuda_graphs):
            raise ConfigError(
                f"--cuda-graphs is {self.cuda_graphs!r}; it must be batch sizes separated by "
                "commas, or 0"
            )
        if not 0 < self.cuda_memory_fraction <= 1:
            raise ConfigError("cuda_memory_fraction must be greater than 0 and at most 1")

    @property
    def graph_sizes(self) -> tuple[int, ...] | None:
        """Batch sizes to capture as CUDA graphs, ascending; None: those that occur."""
        if not self.cuda_graphs:
            return None
        return tuple(sorted({int(size) for size in self.cuda_graphs.split(",")} - {0}))

    @property
    def weight_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def kv_dtype(self) -> torch.dtype:
        return KV_DTYPES[self.kv_cache_dtype]


@dataclass(frozen=True, slots=True)
class ShardIdentity:
    """Which member of which group this process is."""

    rank: int
    world_size: int
    epoch: int  # restarts of the group, counted by the launcher

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> ShardIdentity:
        """From RANK, WORLD_SIZE and HEADGATE_EPOCH. Raises ConfigError naming what is wrong."""
        values = {}
        for name in ("RANK", "WORLD_SIZE", "HEADGATE_EPOCH"):
            try:
                values[name] = int(environment[name])
            except KeyError:
                raise ConfigError(f"{name} is not set; the launcher starts shards") from None
            except ValueError:
                raise ConfigError(f"{name} is {environment[name]!r}, not a number") from None
        if not 0 <= values["RANK"] < values["WORLD_SIZE"]:
            raise ConfigError(
                f"RANK {values['RANK']} is not within WORLD_SIZE {values['WORLD_SIZE']}"
            )
        return cls(values["RANK"], values["WORLD_SIZE"], values["HEADGATE_EPOCH"])

    def address(self, config: ShardConfig) -> str:
        """Where this rank listens. Raises ConfigError where the file names no address for it."""
        if len(config.addresses) != self.world_size:
            raise ConfigError(f"{len(config.addresses)} addresses for {self.world_size} shards")
        return config.addresses[self.rank].replace("{epoch}", str(self.epoch))
