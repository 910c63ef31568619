"""The C++ kernels on 64-bit Arm, run by an emulator: `make test-neon`.

They are compiled for Arm and, with fused products and sums as NEON has them, for this machine. Both
make the same calls, through replay.cpp, and everything they wrote must be the same, byte for byte.
Products have AVX2's bits besides, as docs/quantization.md says.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from headgate.kernels import cpu
from headgate.kernels.cpu import build, library, operations
from headgate.kernels.cpu.calls import out_of_memory
from headgate.kernels.cpu.packed import DTYPES, PackedWeight
from headgate.kernels.cpu.quantised import CODES, QuantisedWeight
from headgate.kernels.cpu.recording import RecordedCall, Recording
from headgate.kernels.cpu.shortlist import Shortlist, linear_largest
from headgate.kernels.int8_cache import Int8Cache
from headgate.kernels.reference import PAIRED_DIMS
from headgate.quant_kinds import KINDS
from headgate.shard.distributed import single_group
from tests.kernels.paged_rows import Chunk, Row, make_step
from tests.kernels.tape import Tape

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
PACKAGES = "g++-aarch64-linux-gnu and qemu-user"  # Debian's and Ubuntu's names
# Where Debian's cross compiler keeps Arm's libraries.
ARM_LIBRARIES = "/usr/aarch64-linux-gnu"

# Compiling for Arm takes minutes where the machine has other work too.
pytestmark = [pytest.mark.exhaustive, pytest.mark.timeout(900)]


@dataclass(frozen=True)
class Players:
    """play_tape with the kernels, for each machine: the words before the tape's path."""

    arm: list[str]
    here: list[str]

    def play(self, tape: Tape, path: Path) -> tuple[list[bytes], list[bytes]]:
        """(Arm's memory, this machine's) at the end."""
        tape.write(path)
        results = []
        for words in (self.arm, self.here):
            output = path.with_suffix(".out")
            done = subprocess.run([*words, path, output], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            results.append(tape.read(output))
        return results[0], results[1]


@pytest.fixture(scope="module")
def players(tmp_path_factory: pytest.TempPathFactory) -> Players:
    if missing := [tool for tool in (COMPILER, EMULATOR, "g++") if shutil.which(tool) is None]:
        say = pytest.fail if os.environ.get("HEADGATE_TEST_NEON") else pytest.skip
        say(f"{' and '.join(missing)} missing: install {PACKAGES}")
    if platform.machine() != "x86_64":
        pytest.skip("compares with x86-64")
    directory = tmp_path_factory.mktemp("neon")
    generic = {source: sets["generic"] for source, sets in build.variants_of("x86_64").items()}
    fused = {
        # The other sets, which are never chosen here, only have to be there.
        source: {name: ("-O0",) for name in sets} | {"generic": (*generic[source], "-mfma")}
        for source, sets in build.variants_of("x86_64").items()
    }
    arm, here = directory / "arm.so", directory / "here.so"
    build.compile_library(COMPILER, arm, build.variants_of("aarch64"))
    build.compile_library("g++", here, fused)
    source = Path(__file__).with_name("play_tape.cpp")
    for compiler, target in ((COMPILER, "arm"), ("g++", "here")):
        command = [compiler, "-std=c++17", "-O1", "-Wall", source, "-ldl", "-o", directory / target]
        subprocess.run(command, check=True)
    emulate = [EMULATOR, "-cpu", "max", "-L", ARM_LIBRARIES]
    return Players([*emulate, f"{directory}/arm", f"{arm}"], [f"{directory}/here", f"{here}"])


@pytest.fixture(autouse=True)
def avx2() -> Iterator[None]:
    """What the calls are noted with."""
    assert cpu.available()
    loaded = library.load()
    assert loaded is not None
    best = loaded.hg_init(b"")
    if loaded.hg_init(b"avx2") is None:
        pytest.skip("this machine has no AVX2")
    yield
    loaded.hg_init(best)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def record(tape: Tape, operation: Callable[[], object]) -> None:
    with Recording(()) as recording:
        operation()
    assert not recording.obstacle and recording.calls
    tape.add(recording)


def assert_same(tape: Tape, players: Players, tmp_path: Path) -> list[bytes]:
    arm, here = players.play(tape, tmp_path / "calls.tape")
    for index, (ours, theirs) in enumerate(zip(arm, here, strict=True)):
        assert ours == theirs, f"region {index} differs"
    return arm


@pytest.mark.parametrize("rows", [1, 4, 7, 30])
@pytest.mark.parametrize("kind", [*map(str, DTYPES), *KINDS])
def test_products(players: Players, tmp_path: Path, kind: str, rows: int) -> None:
    """Weights are packed there too. Odd sizes, and what an MLP's gate makes of a row."""
    columns, inner = 70, 203
    x, weight, bias = random(rows, inner), random(columns, inner, seed=1), random(columns, seed=2)
    x *= torch.logspace(-3, 3, inner)
    tape = Tape()
    tape.hold(x, bias)
    packed: PackedWeight | QuantisedWeight
    pack: tuple[int, ...]
    if kind in KINDS:
        packed, source = QuantisedWeight(weight, kind), weight
        name, code = "hg_quantise_weight", CODES[kind]
        pack = (source.data_ptr(), DTYPES[source.dtype], columns, inner, code, packed.address)
    else:
        dtype = next(dtype for dtype in DTYPES if str(dtype) == kind)
        packed, source = PackedWeight(weight, dtype), weight.to(dtype)
        name = "hg_pack_weight"
        pack = (source.data_ptr(), columns, inner, DTYPES[dtype], packed.address)
    tape.hold(source)
    tape.hold_blank(packed.address, packed.nbytes)
    tape.calls.append(RecordedCall(name, pack, out_of_memory))
    found: list[torch.Tensor] = []
    record(tape, lambda: found.append(operations.linear(x, packed, bias)))
    memory = assert_same(tape, players, tmp_path)
    (result,) = found
    assert memory[tape.region_of(result.data_ptr())] == bytes(result.untyped_storage()), "AVX2"


@pytest.mark.parametrize("rows", [1, 9])
def test_likeliest_tokens_by_a_shortlist(players: Players, tmp_path: Path, rows: int) -> None:
    columns, inner = 150, 203
    x, table = random(rows, inner), random(columns, inner, seed=1).bfloat16()
    packed, shortlist = PackedWeight(table, torch.bfloat16), Shortlist(table)
    code, approximate = DTYPES[torch.bfloat16], shortlist.approximate
    tape = Tape()
    tape.hold(x, table)
    tape.hold_blank(packed.address, packed.nbytes)
    tape.hold_blank(approximate.address, approximate.nbytes)
    tape.hold_blank(shortlist.lengths_address, shortlist.nbytes - approximate.nbytes)
    size = (table.data_ptr(), columns, inner)
    quantise = (table.data_ptr(), code, columns, inner, CODES["int8"], approximate.address)
    lengths = (*size, approximate.address, shortlist.lengths_address)
    for name, arguments in (
        ("hg_pack_weight", (*size, code, packed.address)),
        ("hg_quantise_weight", quantise),
        ("hg_column_lengths", lengths),
    ):
        tape.calls.append(RecordedCall(name, arguments, out_of_memory))
    found: list[torch.Tensor] = []

    def choose() -> None:
        logits = linear_largest(x, packed, shortlist, 1, single_group())
        found.append(operations.likeliest_tokens(logits, 0, 1, single_group()))

    record(tape, choose)
    memory = assert_same(tape, players, tmp_path)
    tokens = np.frombuffer(memory[tape.region_of(found[0].data_ptr())], np.int64)
    assert np.array_equal(tokens, operations.argmax(operations.linear(x, packed, None)))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8], ids=str)
@pytest.mark.parametrize("dim", [40, 48])
@pytest.mark.parametrize(("window", "cap"), [(0, 0.0), (37, 0.0), (0, 5.0)])
def test_attention(
    players: Players, tmp_path: Path, dtype: torch.dtype, dim: int, window: int, cap: float
) -> None:
    """Prompt chunks and decode rows of several partitions; in pairs of bfloat16 numbers, where such
    fit."""
    ends, counts = [1, 17, 65, 150, 600], [1, 17, 3, 70, 1]
    rows = [Row.random(end, 9, 3, dim, end) for end in ends]
    chunks = [Chunk(r, e - c, e) for r, e, c in zip(rows, ends, counts, strict=True)]
    q, k_cache, v_cache, step = make_step(chunks, 16, dtype)
    tape = Tape()
    tape.hold(q, step.cu_query_lens, step.context_lens, step.block_tables)
    for cache in (k_cache, v_cache):
        tape.hold(*((cache.values, cache.scales) if isinstance(cache, Int8Cache) else (cache,)))
    call = (q, k_cache, v_cache, step, 0.3, window, cap, None, dim % PAIRED_DIMS == 0)
    record(tape, lambda: operations.paged_attention(*call))
    assert_same(tape, players, tmp_path)


def test_all_else(players: Players, tmp_path: Path) -> None:
    """Norms, gates, embeddings, rotary positions and writes of keys and values, of odd widths."""
    x, residual, weight = random(5, 203), random(5, 203, seed=1), random(203, seed=2)
    gated, ids, table = random(5, 134), torch.tensor([3, 0, 99, 7, 40]), random(64, 30).bfloat16()
    q, k, v = (random(5, heads, 40, seed=heads) for heads in (9, 3, 4))
    v = v[:, :3].contiguous()
    positions, cos_sin = torch.tensor([0, 5, 2, 11, 3]), random(12, 40, seed=5)
    slots, picks = torch.tensor([3, 0, 31, 17, 9]), torch.tensor([4, 0])
    caches = torch.zeros(2, 2, 16, 3, 40, dtype=torch.float16)
    norms = (random(40, seed=6), random(40, seed=7), 1e-5)
    tape = Tape()
    tape.hold(x, residual, weight, gated, ids, table, q, k, v, positions, cos_sin, slots, caches)
    tape.hold(picks, *norms[:2])
    record(tape, lambda: operations.rms_norm(x, weight, 1e-5))
    record(tape, lambda: operations.rms_norm_residual(x, residual, weight, 1e-5))
    record(tape, lambda: operations.silu_and_mul(gated))
    record(tape, lambda: operations.gelu_and_mul(gated, tanh=True))
    record(tape, lambda: operations.gelu_and_mul(gated, tanh=False))
    record(tape, lambda: operations.embedding(ids, table, 2, torch.float32))
    record(tape, lambda: operations.take_rows(x, picks))
    quantised = [Int8Cache(torch.zeros(2, 16, 3, 40).char(), torch.zeros(2, 3, 16)) for _ in "kv"]
    tape.hold(*(part for cache in quantised for part in (cache.values, cache.scales)))
    for kept, given in product((caches, quantised), (None, norms)):
        arguments = (q, k, v, positions, cos_sin, kept[0], kept[1], slots, given)
        record(tape, lambda arguments=arguments: operations.rotary_and_write_kv(*arguments))
    assert_same(tape, players, tmp_path)
