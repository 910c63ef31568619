"""Sizes for tables of limits and models; what the container's limits are read from."""

from __future__ import annotations

import os
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from headgate.launcher.autosize import GIB, MIB, Sizes, describe, kv_bytes_per_token, work_out_sizes
from headgate.launcher.cli import parse_serve
from headgate.launcher.errors import LaunchError
from headgate.launcher.hardware import (
    CgroupLimits,
    Gpu,
    Hardware,
    count_cpus,
    find_gpus,
    has_wide_vectors,
    parse_nvidia_smi,
)
from headgate.launcher.model_facts import ModelFacts, make_facts, refuse_other_kinds
from headgate.launcher.safetensors_header import WeightFiles

SMALL = ModelFacts(
    architecture="LlamaForCausalLM",
    num_layers=30,
    hidden_size=576,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    intermediate_size=1536,
    vocab_size=49152,
    max_position_embeddings=8192,
    dtype="bfloat16",
    parameters=134_515_008,
)
LARGE = replace(
    SMALL,
    num_layers=32,
    hidden_size=4096,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=14336,
    vocab_size=128256,
    max_position_embeddings=131072,
    parameters=8_030_261_248,
)
MACHINE = Hardware(cores=2, memory_available=16 * GIB, memory_limit=16 * GIB, shm_free=GIB)
L4 = Gpu("NVIDIA L4", 24 * GIB, 23 * GIB, 8.9)
T4 = Gpu("Tesla T4", 16 * GIB, 15 * GIB, 7.5)


def sizes(line: str = "", model: ModelFacts = SMALL, hardware: Hardware = MACHINE) -> Sizes:
    return work_out_sizes(model, parse_serve(shlex.split(line), {}), hardware)


def refusal(line: str = "", model: ModelFacts = SMALL, hardware: Hardware = MACHINE) -> str:
    with pytest.raises(LaunchError) as caught:
        sizes(line, model, hardware)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_embedded_model_on_two_cores() -> None:
    found = sizes()
    assert (found.device, found.num_shard, found.threads_per_shard) == ("cpu", 1, 2)
    assert (found.dtype, found.kv_cache_dtype) == ("bfloat16", "float32")
    assert (found.max_total_tokens, found.max_input_tokens) == (8192, 8191)
    assert sizes("--quantize int8").kv_cache_dtype == "int8"
    assert sizes("--quantize int4").kv_cache_dtype == "int8"
    odd = replace(SMALL, head_dim=80)
    assert sizes("--quantize int8", model=odd).kv_cache_dtype == "bfloat16"
    assert sizes("--quantize int8-weight-only").kv_cache_dtype == "float16"
    assert sizes("--quantize int8 --kv-cache-dtype bfloat16").kv_tokens // 2 == pytest.approx(
        found.kv_tokens, abs=16
    )
    assert sizes("--quantize int8").kv_tokens > 3.7 * found.kv_tokens
    assert sizes("--matmul-precision medium").kv_cache_dtype == "bfloat16"
    assert sizes("--quantize int4 --kv-cache-dtype float32").kv_cache_dtype == "float32"
    assert sizes("--kv-cache-dtype bfloat16").kv_cache_dtype == "bfloat16"
    assert "float16" in refusal("--kv-cache-dtype fp8_e5m2")
    assert found.max_batch_prefill_tokens == 192
    assert found.max_batch_size == 128
    assert GIB - MIB < found.kv_bytes < GIB + MIB
    assert found.kv_tokens == found.num_blocks * 16
    assert found.warnings == ()


@pytest.mark.parametrize(
    ("cores", "line", "threads"),
    [(2, "", 2), (8, "--num-shard 2", 4), (8, "--num-shard 3", 2), (2, "--num-shard 4", 1)],
)
def test_cores_are_divided_among_shards(cores: int, line: str, threads: int) -> None:
    found = sizes(line, hardware=replace(MACHINE, cores=cores))
    assert found.threads_per_shard == threads
    assert bool(found.warnings) == (threads * found.num_shard > cores)


@pytest.mark.parametrize(("cores", "tokens"), [(1, 128), (3, 192), (4, 192), (8, 384), (64, 1024)])
def test_a_cpu_step_takes_about_150_ms(cores: int, tokens: int) -> None:
    found = sizes(hardware=replace(MACHINE, cores=cores))
    assert found.max_batch_prefill_tokens == pytest.approx(tokens, abs=32)


def test_a_cpu_step_of_few_tokens_takes_up_to_twice_as_long() -> None:
    once = 72e9 * 2 * 0.150 / (2 * SMALL.computed_per_token)
    assert once < 128
    assert once < sizes().max_batch_prefill_tokens <= 2 * once
    large = replace(SMALL, parameters=10 * SMALL.parameters)
    assert sizes(model=large).max_batch_prefill_tokens == 128  # where 2 x 10 tokens take as long


def test_a_cpu_step_has_more_tokens_where_vectors_are_wide() -> None:
    wide = replace(MACHINE, wide_vectors=True)
    assert sizes(hardware=wide).max_batch_prefill_tokens == pytest.approx(2 * 101, abs=16)
    assert sizes("--quantize int8", hardware=wide).max_batch_prefill_tokens == 672


@pytest.mark.parametrize(
    ("vendor", "family", "flags", "wide"),
    [
        ("AuthenticAMD", 26, "avx2 avx512f avx512_vnni", True),
        ("AuthenticAMD", 25, "avx2 avx512f avx512_vnni", False),
        ("GenuineIntel", 6, "avx2 avx512f", True),
        ("GenuineIntel", 6, "avx2 avx_vnni", False),
    ],
)
def test_cpuinfo_tells_of_wide_vectors(vendor: str, family: int, flags: str, wide: bool) -> None:
    lines = [f"vendor_id\t: {vendor}", f"cpu family\t: {family}", f"flags\t\t: fpu {flags} sse"]
    assert has_wide_vectors("\n".join(["processor\t: 0", *lines, "", *lines])) == wide


def test_a_processor_that_says_nothing_has_no_wide_vectors() -> None:
    assert not has_wide_vectors("")
    assert not has_wide_vectors("processor\t: 0\nFeatures\t: fp asimd asimddp\n")


def test_a_cpu_step_has_more_tokens_where_products_are_faster() -> None:
    four = replace(MACHINE, cores=4)
    flags = ("", "--matmul-precision medium", "--quantize int4", "--quantize int8")
    tokens = [sizes(flag, hardware=four).max_batch_prefill_tokens for flag in flags]
    assert len(set(tokens)) == 4 and tokens == sorted(tokens)
    assert tokens[3] == pytest.approx(tokens[0] * 240 / 72, abs=48)


@pytest.mark.parametrize(
    ("shards", "largest", "everyone"), [(1, 3, 3), (2, 2, 3), (3, 1, 3), (4, 1, 4), (9, 1, 9)]
)
def test_kv_bytes_follow_the_heads(shards: int, largest: int, everyone: int) -> None:
    head = 2 * 30 * 64 * 4
    assert kv_bytes_per_token(SMALL, shards, "float32") == (largest * head, everyone * head)
    assert kv_bytes_per_token(SMALL, shards, "bfloat16")[0] == largest * head // 2
    assert kv_bytes_per_token(SMALL, shards, "int8")[1] == everyone * 2 * 30 * (64 + 4)


def test_medium_precision_is_for_bfloat16_weights_on_a_cpu() -> None:
    found = sizes("--matmul-precision medium")
    assert found.matmul_precision == "medium"
    assert "rounded" in dict(describe(found, SMALL, MACHINE))["dtype"]
    for line, hardware, words in (
        ("--dtype float16", MACHINE, "float16 weights"),
        ("--dtype float32", MACHINE, "float32 weights"),
        ("--quantize int8", MACHINE, "--quantize int8"),
        ("", replace(MACHINE, gpus=(L4,)), "a GPU"),
    ):
        said = refusal(f"--matmul-precision medium {line}", hardware=hardware)
        assert said.startswith("--matmul-precision medium is for") and words in said
    cpu = replace(MACHINE, gpus=(L4,))
    assert sizes("--matmul-precision medium --kernels cpu", hardware=cpu).device == "cpu"


def test_draft_tokens_by_the_device() -> None:
    gpu = replace(MACHINE, gpus=(L4,))
    assert (sizes().speculate, sizes(hardware=gpu).speculate) == (11, 0)
    assert sizes("--kernels cpu", hardware=gpu).speculate == 11
    assert sizes("--null-shard").speculate == 0  # a benchmark of one token a row and step
    assert sizes("--speculate 0").speculate == 0
    for line, hardware in (("", MACHINE), ("", gpu), ("--null-shard", MACHINE)):
        found = sizes(f"--speculate 3 {line}", hardware=hardware)
        assert found.speculate == 3
        assert dict(describe(found, SMALL, hardware))["draft tokens"] == "up to 3 a row"
    assert dict(describe(sizes("--speculate 0"), SMALL, MACHINE))["draft tokens"] == "none"


def test_given_sizes_are_taken() -> None:
    found = sizes(
        "--max-batch-total-tokens 1000 --max-total-tokens 500 --max-input-tokens 400 "
        "--max-batch-prefill-tokens 64 --max-batch-size 4 --dtype float32 --threads-per-shard 1"
    )
    assert found.num_blocks == 63  # whole blocks
    assert (found.max_total_tokens, found.max_input_tokens) == (500, 400)
    assert (found.max_batch_prefill_tokens, found.max_batch_size) == (64, 4)
    assert (found.dtype, found.threads_per_shard) == ("float32", 1)


def test_a_step_budget_made_for_a_gpu_is_cut_on_a_cpu() -> None:
    found = sizes("--max-batch-prefill-tokens 16384")
    assert found.max_batch_prefill_tokens == 1024
    assert any("16384 is cut to 1024" in warning for warning in found.warnings)


def test_requests_are_no_longer_than_the_cache() -> None:
    assert sizes("--max-batch-total-tokens 1024").max_total_tokens == 1024


def test_a_long_request_makes_the_cache_grow() -> None:
    model = replace(LARGE, parameters=SMALL.parameters)  # 1 GiB holds 4096 of its tokens
    assert sizes(model=model).max_total_tokens == 4096
    found = sizes("--max-total-tokens 8192", model=model)
    assert found.max_total_tokens == 8192 and found.kv_tokens >= 8192


def test_no_more_cache_than_all_requests_can_use() -> None:
    tiny = replace(SMALL, num_layers=1, num_kv_heads=1, head_dim=8, max_position_embeddings=64)
    assert sizes(model=tiny).kv_tokens == 128 * 64


def test_the_cache_shrinks_to_what_fits() -> None:
    found = sizes(hardware=replace(MACHINE, memory_available=int(1.5 * GIB)))
    assert 0 < found.kv_bytes < GIB // 2
    assert found.weight_bytes + found.overhead_bytes + found.kv_bytes < 1.5 * GIB
    assert found.max_total_tokens <= found.kv_tokens


def test_too_little_memory_names_need_free_and_what_fits() -> None:
    message = refusal("--max-batch-total-tokens 1000000")
    assert "--max-batch-total-tokens 1000000 needs" in message
    assert "16.00 GiB are free" in message and "weights 513 MiB" in message
    advised = int(message.split("--max-batch-total-tokens ")[-1].rstrip("."))
    assert sizes(f"--max-batch-total-tokens {advised}").kv_tokens == advised
    assert "Too little" in refusal(f"--max-batch-total-tokens {advised + 1}")


def test_a_model_that_cannot_fit() -> None:
    message = refusal(model=LARGE)
    assert "weights 29.92 GiB" in message and "no setting makes it fit" in message


def test_limits_between_flags_and_model() -> None:
    assert "9 attention heads" in refusal("--num-shard 10") and "10" in refusal("--num-shard 10")
    assert "8192 positions" in refusal("--max-total-tokens 9000")
    assert sizes("--max-total-tokens 9000 --rope-factor 2").max_total_tokens == 9000
    assert "--max-input-tokens 9000" in refusal("--max-input-tokens 9000")
    assert "--num-shard" in refusal("--sharded true")


def test_one_shard_per_gpu() -> None:
    hardware = replace(MACHINE, gpus=(L4, L4))
    found = sizes(model=LARGE, hardware=hardware)
    assert (found.device, found.num_shard, found.dtype) == ("cuda", 2, "bfloat16")
    assert (found.kv_cache_dtype, found.num_blocks) == ("bfloat16", 0)
    assert sizes("--quantize int8", LARGE, hardware).kv_cache_dtype == "bfloat16"
    fp8 = sizes("--kv-cache-dtype fp8_e4m3fn", LARGE, hardware)
    assert fp8.kv_cache_dtype == "fp8_e4m3fn"
    assert fp8.kv_bytes == pytest.approx(found.kv_bytes, rel=0.01)
    assert found.max_batch_prefill_tokens == 4096
    assert 4096 < found.max_total_tokens <= 131072
    assert sizes("--sharded false", hardware=hardware).num_shard == 1
    assert "2 GPUs" in refusal("--num-shard 3", hardware=hardware)
    assert sizes("--max-batch-total-tokens 32000", LARGE, hardware).num_blocks == 2000


def test_gpus_without_bfloat16_or_room() -> None:
    assert sizes(hardware=replace(MACHINE, gpus=(T4,))).dtype == "float16"
    assert "Too little memory" in refusal(model=LARGE, hardware=replace(MACHINE, gpus=(T4,)))
    assert "8.0" in refusal("--kv-cache-dtype fp8_e5m2", hardware=replace(MACHINE, gpus=(T4,)))
    cramped = replace(MACHINE, gpus=(L4, L4), shm_free=64 * MIB)
    assert "/dev/shm" in sizes(hardware=cramped).warnings[0]


@pytest.mark.parametrize(
    ("kind", "layers", "head"),
    [("int8", 1.03125, 1.03125), ("int8-weight-only", 1.0625, 1.0625), ("int4", 0.625, 1.03125)],
)
def test_quantised_weights_are_counted_as_they_are_held(
    kind: str, layers: float, head: float
) -> None:
    table = SMALL.vocab_size * SMALL.hidden_size
    tied = sizes(f"--quantize {kind}", replace(SMALL, tied_embeddings=True))
    assert tied.quantize == kind
    assert tied.weight_bytes == 2 * table + int((SMALL.parameters - table) * layers + table * head)
    own = sizes(f"--quantize {kind}", replace(SMALL, parameters=SMALL.parameters + table))
    assert own.weight_bytes == tied.weight_bytes
    assert sizes().quantize == ""


def test_quantised_weights_on_a_gpu() -> None:
    hardware = replace(MACHINE, gpus=(L4,))
    found = sizes("--quantize int8", SMALL, hardware)
    assert (found.device, found.quantize) == ("cuda", "int8")
    assert found.weight_bytes < sizes("", SMALL, hardware).weight_bytes


def test_a_float32_checkpoint() -> None:
    assert sizes(model=replace(SMALL, dtype="float32")).dtype == "float32"
    gpu = replace(MACHINE, gpus=(L4,))
    assert sizes(model=replace(SMALL, dtype="float32"), hardware=gpu).dtype == "bfloat16"


# ------------------------------------------------------------------ hardware


def cgroup(root: Path, membership: str, files: dict[str, str]) -> CgroupLimits:
    for name, text in {"proc/self/cgroup": membership, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return CgroupLimits(root)


def test_cgroup_version_2_takes_the_least_of_all_levels(tmp_path: Path) -> None:
    base = "sys/fs/cgroup"
    limits = cgroup(
        tmp_path,
        "0::/pod/container\n",
        {
            f"{base}/pod/cpu.max": "250000 100000",
            f"{base}/pod/container/cpu.max": "max 100000",
            f"{base}/pod/memory.max": str(8 * GIB),
            f"{base}/pod/memory.current": str(2 * GIB),
            f"{base}/pod/memory.stat": f"anon 5\ninactive_file {GIB}\n",
            f"{base}/pod/container/memory.max": "max",
        },
    )
    assert limits.cpu_quota() == 2.5
    assert limits.memory_limit() == 8 * GIB
    assert limits.memory_room() == 7 * GIB


def test_cgroup_version_1(tmp_path: Path) -> None:
    base = "sys/fs/cgroup"
    limits = cgroup(
        tmp_path,
        "4:memory:/docker/x\n3:cpu,cpuacct:/docker/x\n2:cpuset:/docker/x\n",
        {
            f"{base}/cpu/docker/x/cpu.cfs_quota_us": "50000",
            f"{base}/cpu/docker/x/cpu.cfs_period_us": "100000",
            f"{base}/cpuset/docker/x/cpuset.cpus": "0",
            f"{base}/memory/memory.limit_in_bytes": "9223372036854771712",
            f"{base}/memory/docker/x/memory.limit_in_bytes": str(GIB),
            f"{base}/memory/docker/x/memory.usage_in_bytes": str(GIB // 4),
        },
    )
    assert limits.cpu_quota() == 0.5
    assert limits.cores() == 1
    assert limits.memory_room() == GIB - GIB // 4


def test_no_limits_at_all(tmp_path: Path) -> None:
    limits = cgroup(tmp_path, "0::/\n", {"sys/fs/cgroup/cpu.stat": "usage_usec 1"})
    assert (limits.cpu_quota(), limits.memory_limit(), limits.memory_room()) == (None, None, None)
    assert limits.cores() == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(("text", "count"), [("0", 1), ("0-3", 4), ("0-1,8,10-11", 5)])
def test_cpu_lists(text: str, count: int) -> None:
    assert count_cpus(text) == count


def test_nvidia_smi_rows() -> None:
    rows = "NVIDIA L4, 23034, 22500, 8.9\nNVIDIA A100-SXM4, 81920, 81000, 8.0\n[N/A]\n"
    assert [gpu.name for gpu in parse_nvidia_smi(rows)] == ["NVIDIA L4", "NVIDIA A100-SXM4"]
    assert parse_nvidia_smi(rows)[0].total_bytes == 23034 * MIB


def test_hidden_gpus_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headgate.launcher.hardware._ask_nvidia_smi", lambda: (L4, T4))
    monkeypatch.setattr("headgate.launcher.hardware.torch_has_cuda", lambda: True)
    assert find_gpus({})[0] == (L4, T4)
    assert find_gpus({"CUDA_VISIBLE_DEVICES": "1"})[0] == (T4,)
    assert find_gpus({"NVIDIA_VISIBLE_DEVICES": "void"})[0] == ()
    assert find_gpus({"CUDA_VISIBLE_DEVICES": ""})[0] == ()
    monkeypatch.setattr("headgate.launcher.hardware.torch_has_cuda", lambda: False)
    gpus, note = find_gpus({})
    assert gpus == () and "without CUDA" in note


# --------------------------------------------------------------------- model


def test_config_aliases() -> None:
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "vocab_size": 50257,
    }
    facts = make_facts(config, WeightFiles((), 124_000_000, 0, "F32"), Path("gpt2"))
    assert (facts.hidden_size, facts.num_kv_heads, facts.head_dim) == (768, 12, 64)
    assert (facts.max_position_embeddings, facts.dtype) == (1024, "float32")
    with pytest.raises(LaunchError, match="no usable num_hidden_layers"):
        make_facts({**config, "n_layer": None}, WeightFiles((), 0, 0, ""), Path("gpt2"))


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}, "encoder-decoder"),
        ({"architectures": ["XForConditionalGeneration"], "vision_config": {}}, "vision"),
        ({"architectures": ["MambaForCausalLM"], "model_type": "mamba"}, "state-space"),
        ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, "encoder"),
        ({"architectures": ["L"], "quantization_config": {"quant_method": "gptq"}}, "gptq"),
    ],
)
def test_other_kinds_of_model_are_named(config: dict, word: str) -> None:
    with pytest.raises(LaunchError) as caught:
        refuse_other_kinds(config, Path("model"))
    assert word in str(caught.value)
