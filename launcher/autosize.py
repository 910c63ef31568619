"""Sizes that the user did not give, worked out from hardware and model; and whether all of it fits.

Pure arithmetic: hardware.py and model_facts.py look, this file decides. What it estimates and why
is in docs/configuration.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from headgate.launcher.config import LauncherConfig
from headgate.launcher.errors import LaunchError
from headgate.launcher.hardware import Gpu, Hardware
from headgate.launcher.model_facts import ModelFacts
from headgate.quant_kinds import cpu_kv_dtype

GIB = 1 << 30
MIB = 1 << 20

CPU_KV_BYTES = GIB  # of all shards together
GPU_STEP_TOKENS = 4096  # TGI's default
STEP_SECONDS = 0.150  # a CPU step should take no longer: it bounds latency between tokens
# Prompts get what rows leave of a step, so one of fewer tokens may take up to twice as long.
ROOMY_STEP_TOKENS = 192
# Sustained by one core over whole steps, by --quantize or else --matmul-precision; and how many
# times as much where vectors are wide.
CORE_FLOPS = {
    "highest": 72e9,
    "medium": 160e9,
    "int8": 240e9,
    "int8-weight-only": 72e9,
    "int4": 200e9,
}
WIDE_VECTORS_GAIN = 2
# A budget made for a GPU would let one step hold up all others.
CPU_STEP_TOKENS = (128, 1024)
# To a row; none on a GPU unless asked for. With its next token they fill a row tile of float32.
CPU_DRAFT_TOKENS = 11
SMALLEST_KV_TOKENS = 512  # less is no use, so it is too little memory
FALLBACK_POSITIONS = 4096  # for a model that does not say how long it may get

SHARD_OVERHEAD = 400 * MIB  # an idle shard process: Python, PyTorch, its libraries
ROUTER_OVERHEAD = 150 * MIB
GATEWAY_OVERHEAD = 80 * MIB
GPU_OVERHEAD = 512 * MIB  # CUDA context and libraries on each GPU
MEMORY_RESERVE = 0.05  # of the free memory, left alone
GPU_RESERVE = 0.10  # of a GPU's memory, for fragments and peaks
SHM_FOR_NCCL = 256 * MIB

NO_LIMIT = 1 << 60

_ARITHMETIC = {
    "highest": ", float32 arithmetic",
    "medium": ", products with inputs rounded to it, float32 sums",
}
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_KV_ITEM_BYTES = {**_ITEM_BYTES, "fp8_e4m3fn": 1, "fp8_e5m2": 1, "int8": 1}
_KV_SCALE_BYTES = {"int8": 4}  # for every token and head
_FP8_CAPABILITY = {"fp8_e4m3fn": 8.9, "fp8_e5m2": 8.0}  # of GPUs that convert it
# Of a quantised weight: its value, and its share of the group's scale (and minimum). A CPU's int8
# weights have one scale a channel, its int4 weights scales and minima in bytes: 3 and 8 % less.
_QUANTISED_BYTES = {
    "int8": 1 + 2 / 64,
    "int8-weight-only": 1 + 2 / 32,
    "int4": 1 / 2 + 4 / 32,
}


@dataclass(frozen=True, slots=True)
class Sizes:
    """All sizes of a server, given or worked out. Tokens and bytes; bytes are of all shards."""

    device: str  # "cpu" or "cuda"
    num_shard: int
    dtype: str
    quantize: str  # a kind, or "" for weights in `dtype`
    matmul_precision: str
    kv_cache_dtype: str
    threads_per_shard: int
    max_input_tokens: int
    max_total_tokens: int
    max_batch_prefill_tokens: int
    max_batch_size: int
    speculate: int  # draft tokens that a step may add to a row
    block_size: int
    num_blocks: int  # 0: as many as fit, found out by the shards (GPU)
    weight_bytes: int
    kv_bytes: int  # of num_blocks; on a GPU without a given size, the estimate
    overhead_bytes: int
    warnings: tuple[str, ...] = ()

    @property
    def kv_tokens(self) -> int:
        """Tokens the KV cache holds; 0 where the shards find out."""
        return self.num_blocks * self.block_size


@dataclass(frozen=True, slots=True)
class Shape:
    """How the model is divided and stored, and the size of a step."""

    device: str
    num_shard: int
    threads: int  # per shard
    dtype: str
    quantize: str
    kv_cache_dtype: str
    step_tokens: int
    batch_size: int


def work_out_sizes(model: ModelFacts, config: LauncherConfig, hardware: Hardware) -> Sizes:
    """All sizes of a server. Raises LaunchError with one sentence where something cannot be."""
    shape = choose_shape(model, config, hardware)
    demand = _Demand(model, config, shape)
    longest = _longest_allowed(model, config)
    if config.null_shard:
        room = NO_LIMIT  # neither weights nor keys and values are held
    elif shape.device == "cuda":
        room = _gpu_room(demand, hardware, config)
    else:
        room = (
            int(hardware.memory_available * (1 - MEMORY_RESERVE))
            - demand.weight_bytes
            - demand.overhead_bytes
        )
    kv_tokens = _kv_tokens(demand, room, hardware, longest)
    total = _max_total_tokens(config, longest, kv_tokens)
    given_blocks = shape.device == "cpu" or config.max_batch_total_tokens is not None
    return Sizes(
        device=shape.device,
        num_shard=shape.num_shard,
        dtype=shape.dtype,
        quantize=shape.quantize,
        matmul_precision=config.matmul_precision,
        kv_cache_dtype=shape.kv_cache_dtype,
        threads_per_shard=shape.threads,
        max_input_tokens=config.max_input_tokens or total - 1,
        max_total_tokens=total,
        max_batch_prefill_tokens=shape.step_tokens,
        max_batch_size=shape.batch_size,
        speculate=_draft_tokens(config, shape.device),
        block_size=config.block_size,
        num_blocks=kv_tokens // config.block_size if given_blocks else 0,
        weight_bytes=demand.weight_bytes,
        kv_bytes=kv_tokens * demand.kv_bytes_per_token,
        overhead_bytes=demand.overhead_bytes,
        warnings=_warnings(config, hardware, shape),
    )


def choose_shape(model: ModelFacts, config: LauncherConfig, hardware: Hardware) -> Shape:
    """What does not depend on memory. Raises LaunchError."""
    on_cpu = config.kernels == "cpu" or config.null_shard
    device = "cuda" if hardware.gpus and not on_cpu else "cpu"
    num_shard = choose_num_shard(model, config, hardware, device)
    dtype = choose_dtype(model, config, hardware.gpus if device == "cuda" else ())
    _check_precision(config, device, dtype)
    threads = config.threads_per_shard or max(1, hardware.cores // num_shard)
    core_flops = CORE_FLOPS[config.quantize or config.matmul_precision]
    if hardware.wide_vectors:
        core_flops *= WIDE_VECTORS_GAIN
    step_tokens = config.max_batch_prefill_tokens or _step_tokens(
        model, device, min(hardware.cores, threads * num_shard) * core_flops
    )
    if device == "cpu":
        step_tokens = min(step_tokens, CPU_STEP_TOKENS[1])
    return Shape(
        device=device,
        num_shard=num_shard,
        threads=threads,
        dtype=dtype,
        quantize=config.quantize or "",
        kv_cache_dtype=choose_kv_cache_dtype(
            config, dtype, hardware.gpus if device == "cuda" else (), model.head_dim
        ),
        step_tokens=step_tokens,
        batch_size=min(config.max_batch_size or config.max_concurrent_requests, step_tokens),
    )


def choose_num_shard(
    model: ModelFacts, config: LauncherConfig, hardware: Hardware, device: str
) -> int:
    """Number of shards: as given, else one per GPU, else one. Raises LaunchError."""
    gpus = len(hardware.gpus) if device == "cuda" else 0
    number = config.num_shard
    if number is None:
        number = min(gpus or 1, model.num_heads)
        if config.sharded is False:
            number = 1
        elif config.sharded and number < 2:
            raise LaunchError(
                f"--sharded true needs at least 2 shards, but there are {gpus} GPUs: give "
                "--num-shard."
            )
    if number > model.num_heads:
        raise LaunchError(
            f"--num-shard {number} is more than the model's {model.num_heads} attention heads."
        )
    if gpus and number > gpus:
        raise LaunchError(f"--num-shard {number} is more than the {gpus} GPUs in sight.")
    return number


def choose_dtype(model: ModelFacts, config: LauncherConfig, gpus: tuple[Gpu, ...]) -> str:
    """How weights are stored: as given, else as in the checkpoint where the device can."""
    dtype = config.dtype or model.dtype or "bfloat16"
    if not gpus or config.dtype:
        return dtype
    if dtype == "float32":  # twice the memory for nothing on a GPU
        dtype = "bfloat16"
    if dtype == "bfloat16" and min(gpu.capability for gpu in gpus) < 8:
        return "float16"
    return dtype


def _check_precision(config: LauncherConfig, device: str, dtype: str) -> None:
    """Raises LaunchError where products' inputs can't be rounded."""
    if config.matmul_precision == "highest":
        return
    found = "" if dtype == "bfloat16" else f"{dtype} weights"
    if config.quantize:
        found = f"--quantize {config.quantize}"
    if device == "cuda":
        found = "a GPU (--kernels cpu uses the CPU)"
    if found:
        raise LaunchError(
            f"--matmul-precision {config.matmul_precision} is for bfloat16 weights on a CPU, not "
            f"for {found}."
        )


def choose_kv_cache_dtype(
    config: LauncherConfig, dtype: str, gpus: tuple[Gpu, ...], head_dim: int
) -> str:
    """How keys and values are stored. Raises LaunchError where the device can't."""
    given = config.kv_cache_dtype
    if given == "auto":
        if gpus:
            return dtype
        return cpu_kv_dtype(config.quantize or "", config.matmul_precision, head_dim)
    if given in _FP8_CAPABILITY:
        if not gpus and config.kernels in ("auto", "cpu"):
            raise LaunchError(
                f"--kv-cache-dtype {given} is for GPUs; on a CPU there is float32, bfloat16, "
                "float16 and int8."
            )
        least = _FP8_CAPABILITY[given]
        lowest = min((gpu.capability for gpu in gpus), default=least)
        if lowest < least:
            raise LaunchError(
                f"--kv-cache-dtype {given} needs GPUs of compute capability {least}, not {lowest}."
            )
    return given


def kv_bytes_per_token(model: ModelFacts, num_shard: int, kv_dtype: str) -> tuple[int, int]:
    """(bytes on the rank that holds most, bytes on all ranks) for one token's keys and values."""
    head = model.head_dim * _KV_ITEM_BYTES[kv_dtype] + _KV_SCALE_BYTES.get(kv_dtype, 0)
    per_head = 2 * model.num_layers * head
    heads = [model.kv_heads_on(rank, num_shard) for rank in range(num_shard)]
    return max(heads) * per_head, sum(heads) * per_head


class _Demand:
    """What the server needs besides the KV cache, and what each KV token costs."""

    def __init__(self, model: ModelFacts, config: LauncherConfig, shape: Shape) -> None:
        self.config = config
        self.device = shape.device
        self.num_shard = num_shard = shape.num_shard
        self.batch_size = shape.batch_size
        self.kv_bytes_on_largest, self.kv_bytes_per_token = kv_bytes_per_token(
            model, num_shard, shape.kv_cache_dtype
        )
        # A CPU computes in float32 and keeps no second copy: dtype only rounds the values.
        item = 4 if shape.device == "cpu" else _ITEM_BYTES[shape.dtype]
        self.weight_bytes = _weight_bytes(model, shape, item)
        self.activation_bytes = num_shard * _activation_bytes(model, shape, item)
        self.overhead_bytes = (
            num_shard * SHARD_OVERHEAD
            + ROUTER_OVERHEAD
            + config.gateway_workers * GATEWAY_OVERHEAD
            + self.activation_bytes
        )


def _weight_bytes(model: ModelFacts, shape: Shape, item: int) -> int:
    if not shape.quantize:
        return model.parameters * item
    # The table that ids are looked up in stays as it is. The vocabulary's projection, a copy of it
    # where they are tied, is int8 also beside int4 layers.
    table = model.embedding_parameters
    head = _QUANTISED_BYTES["int8" if shape.quantize == "int4" else shape.quantize]
    quantised = model.layer_parameters * _QUANTISED_BYTES[shape.quantize] + table * head
    return table * _ITEM_BYTES[shape.dtype] + int(quantised)


def _activation_bytes(model: ModelFacts, shape: Shape, item: int) -> int:
    hidden = 8 * model.hidden_size
    mlp = 3 * math.ceil(model.intermediate_size / shape.num_shard)
    logits = 3 * 4 * shape.batch_size * model.vocab_size  # float32: logits, noise, one sort
    return shape.step_tokens * (hidden + mlp) * item + logits


def _step_tokens(model: ModelFacts, device: str, cpu_flops: float) -> int:
    if device == "cuda":
        return GPU_STEP_TOKENS
    tokens = int(cpu_flops * STEP_SECONDS / (2 * model.computed_per_token))
    tokens = max(tokens, min(2 * tokens, ROOMY_STEP_TOKENS))
    low, high = CPU_STEP_TOKENS
    return max(low, min(high, tokens // 16 * 16))


def _draft_tokens(config: LauncherConfig, device: str) -> int:
    if config.speculate is not None:
        return config.speculate
    if device == "cuda" or config.null_shard:  # which measures what one token of a row costs
        return 0
    return CPU_DRAFT_TOKENS


def _longest_allowed(model: ModelFacts, config: LauncherConfig) -> int:
    """Positions the model may be given, stretched by --rope-factor. Raises LaunchError."""
    positions = model.max_position_embeddings
    longest = int(positions * (config.rope_factor or 1.0)) or FALLBACK_POSITIONS
    given = config.max_total_tokens
    if given is None:
        return longest
    if positions and given > longest:
        raise LaunchError(
            f"--max-total-tokens {given} is more than the {longest} positions of the model; "
            "--rope-scaling and --rope-factor stretch them."
        )
    return given


def _gpu_room(demand: _Demand, hardware: Hardware, config: LauncherConfig) -> int:
    """Bytes for KV on all GPUs together, by what the fullest can give."""
    smallest = min(
        min(gpu.free_bytes, int(gpu.total_bytes * config.cuda_memory_fraction))
        - int(gpu.total_bytes * GPU_RESERVE)
        for gpu in hardware.gpus[: demand.num_shard]
    )
    room = smallest - GPU_OVERHEAD
    room -= (demand.weight_bytes + demand.activation_bytes) // demand.num_shard
    return room // demand.kv_bytes_on_largest * demand.kv_bytes_per_token


def _kv_tokens(demand: _Demand, room: int, hardware: Hardware, longest: int) -> int:
    """Tokens of the KV cache, whole blocks. Raises LaunchError for too little memory."""
    config, per_token = demand.config, demand.kv_bytes_per_token
    block = config.block_size
    fits = max(0, room // per_token) // block * block
    given = config.max_batch_total_tokens
    if given is not None:
        wanted = least = _whole_blocks(given, block)
    else:
        least = _whole_blocks(config.max_total_tokens or min(SMALLEST_KV_TOKENS, longest), block)
        wanted = CPU_KV_BYTES // per_token if demand.device == "cpu" else fits
        wanted = min(wanted, demand.batch_size * longest)  # more could never be in use
        wanted = min(max(_whole_blocks(wanted, block), least), max(fits, least))
    if least > fits:
        raise LaunchError(_too_little(demand, wanted, least, fits, hardware))
    return wanted


def _whole_blocks(tokens: int, block: int) -> int:
    return -(-tokens // block) * block


def _too_little(demand: _Demand, wanted: int, least: int, fits: int, hardware: Hardware) -> str:
    config = demand.config
    weights, overhead = demand.weight_bytes, demand.overhead_bytes
    if demand.device == "cpu":
        free, where = hardware.memory_available, "are free"
    else:
        free = sum(gpu.free_bytes for gpu in hardware.gpus[: demand.num_shard])
        where = f"are free on {demand.num_shard} GPUs"
    kv = least * demand.kv_bytes_per_token
    if config.max_batch_total_tokens is not None:
        cause, setting = (
            f"--max-batch-total-tokens {config.max_batch_total_tokens}",
            ("--max-batch-total-tokens"),
        )
    elif config.max_total_tokens is not None:
        cause, setting = f"--max-total-tokens {config.max_total_tokens}", "--max-total-tokens"
    else:
        cause, setting = "this model", "--max-batch-total-tokens"
    if fits >= min(SMALLEST_KV_TOKENS, least):
        advice = f"the largest that fits is {setting} {fits}"
    else:
        advice = "no setting makes it fit, only a smaller model or more memory"
    return (
        f"Too little memory: {cause} needs {show_bytes(weights + kv + overhead)} (weights "
        f"{show_bytes(weights)}, KV cache {show_bytes(kv)}, processes and activations "
        f"{show_bytes(overhead)}), but {show_bytes(free)} {where}; {advice}."
    )


def _max_total_tokens(config: LauncherConfig, longest: int, kv_tokens: int) -> int:
    total = min(longest, kv_tokens)
    given = config.max_input_tokens
    if given is not None and given >= total:
        limit = "--max-total-tokens" if config.max_total_tokens else "the longest request possible"
        raise LaunchError(f"--max-input-tokens {given} must be below {limit}, {total}.")
    return total


def _warnings(config: LauncherConfig, hardware: Hardware, shape: Shape) -> tuple[str, ...]:
    device, num_shard, threads = shape.device, shape.num_shard, shape.threads
    budget = shape.step_tokens
    found = []
    if hardware.gpu_note:
        found.append(f"running on the CPU: {hardware.gpu_note}")
    if device == "cpu" and threads * num_shard > hardware.cores:
        found.append(
            f"{num_shard} shards of {threads} threads share {hardware.cores} cores: fewer shards "
            "would be faster"
        )
    if device == "cuda" and num_shard > 1 and hardware.shm_free < SHM_FOR_NCCL:
        found.append(
            f"/dev/shm has only {show_bytes(hardware.shm_free)}, which NCCL may find too small: "
            "start the container with --shm-size 1g"
        )
    if config.max_batch_prefill_tokens and config.max_batch_prefill_tokens > budget:
        found.append(
            f"--max-batch-prefill-tokens {config.max_batch_prefill_tokens} is cut to {budget}, "
            "the most that a step computes on a CPU"
        )
    if config.max_batch_size and config.max_batch_size > budget:
        found.append(
            f"--max-batch-size {config.max_batch_size} is cut to {budget}, the tokens of a step"
        )
    return tuple(found)


def describe(sizes: Sizes, model: ModelFacts, hardware: Hardware) -> list[tuple[str, str]]:
    """The sizes as rows for people."""
    on_cpu = sizes.device == "cpu"
    if not on_cpu:
        where = ", ".join(sorted({gpu.name for gpu in hardware.gpus[: sizes.num_shard]}))
        split = f"{sizes.num_shard} (on {where})"
        kv = "what is free after loading"
    else:
        split = f"{sizes.num_shard} x {sizes.threads_per_shard} threads (of {hardware.cores} cores)"
        kv = show_bytes(sizes.kv_bytes)
    if sizes.num_blocks:
        kv = (
            f"{sizes.kv_tokens} tokens, {show_bytes(sizes.kv_bytes)} in {sizes.num_blocks} blocks "
            f"of {sizes.block_size}, {sizes.kv_cache_dtype}"
        )
    need = sizes.weight_bytes + sizes.overhead_bytes
    if on_cpu:
        need += sizes.kv_bytes
    return [
        ("model", f"{model.architecture}, {_millions(model.parameters)} parameters"),
        ("shards", split),
        ("dtype", sizes.dtype + (_ARITHMETIC[sizes.matmul_precision] if on_cpu else "")),
        ("quantisation", sizes.quantize or "none"),
        ("longest request", f"{sizes.max_total_tokens} tokens (prompt {sizes.max_input_tokens})"),
        ("tokens per step", str(sizes.max_batch_prefill_tokens)),
        ("draft tokens", f"up to {sizes.speculate} a row" if sizes.speculate else "none"),
        ("sequences at a time", str(sizes.max_batch_size)),
        ("KV cache", kv),
        ("memory", f"about {show_bytes(need)} of {show_bytes(hardware.memory_available)} free")
        if on_cpu
        else ("weights", show_bytes(sizes.weight_bytes)),
    ]


def show_bytes(number: int) -> str:
    """For people: 1.50 GiB, 300 MiB."""
    if number >= GIB:
        return f"{number / GIB:.2f} GiB"
    return f"{max(number, 0) / MIB:.0f} MiB"


def _millions(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number < 10_000_000 else f"{number / 1e6:.0f} M"
