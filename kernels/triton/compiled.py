"""Compiles noted launches for a GPU that need not be there, and reads what became of them.

For checks and reports; serving never comes here. Needs triton compiled kernels, so not the
interpreter.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from headgate.kernels.triton.launch import Launch

_REGISTERS = 64 << 10  # of a processor; a thread's are given out by eights
_PROGRAMS_SHARED = 1 << 10  # bytes of shared memory that each program takes beside its own
_LEAST_WARPS = 8  # of a processor: two for each scheduler, one of which waits for memory


@dataclass(frozen=True, slots=True)
class Processor:
    """What the programs on one streaming multiprocessor share."""

    shared: int  # bytes
    warps: int
    programs: int


# CUDA C++ Programming Guide, technical specifications per compute capability.
PROCESSORS = {
    "sm_80": Processor(164 << 10, 64, 32),
    "sm_89": Processor(100 << 10, 48, 24),
    "sm_90": Processor(228 << 10, 64, 32),
    "sm_100": Processor(228 << 10, 64, 32),
}

_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e5m2: "*fp8e5",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
_PRODUCTS = {"tcgen05.mma": "tcgen05", "wgmma.mma_async": "wgmma", "mma.sync": "mma.sync"}
# Bytes of one load: from global memory to registers, or straight to shared memory.
_VECTOR = re.compile(r"ld\.global[.\w:]*?\.(?:v([248])\.)?[bfus](8|16|32|64)\b")
_COPY = re.compile(r"cp\.async\.c[ag]\.shared\.global[^;]*?, (?:0x)?([0-9a-f]+)")
_DIVISIBLE = [["tt.divisibility", 16]]


@dataclass(frozen=True, slots=True)
class Compiled:
    """What one kernel takes on one chip."""

    kernel: str
    chip: str
    warps: int  # of a program
    registers: int  # per thread
    spilled: int  # bytes per thread that did not fit
    spillable: int  # of them, that no inner loop needs: see _spillable
    shared: int  # bytes of shared memory per program
    products: str  # the tensor cores' instruction, "" where none is used
    widest_load: int  # bytes
    has_dot: bool

    @property
    def warps_at_once(self) -> int:
        """Warps that a processor holds at a time, as registers and shared memory allow."""
        processor = PROCESSORS[self.chip]
        registers = -(-self.registers // 8) * 8 * 32 * self.warps
        programs = min(
            processor.programs,
            processor.warps // self.warps,
            _REGISTERS // registers,
            processor.shared // (self.shared + _PROGRAMS_SHARED),
        )
        return programs * self.warps

    @property
    def problems(self) -> list[str]:
        """What must not be; nothing where all is well."""
        found = []
        if self.spilled > self.spillable:
            found.append(f"{self.spilled} bytes of registers spilled")
        allowed = PROCESSORS[self.chip].shared - _PROGRAMS_SHARED
        if self.shared > allowed:
            found.append(f"{self.shared} bytes of shared memory, {allowed} allowed")
        elif self.warps_at_once < _LEAST_WARPS:
            found.append(f"{self.warps_at_once} warps on a processor, {_LEAST_WARPS} hide waits")
        if self.has_dot and not self.products:
            found.append("a product without tensor cores")
        return found


def compile_for(launch: Launch, chip: str) -> Compiled:
    """Compiles what `launch` would run on `chip`. Raises what the compiler raises."""
    signature, constants, attributes = _specialised(launch)
    target = GPUTarget("cuda", int(chip.removeprefix("sm_")), 32)
    options = {
        "num_warps": launch.warps,
        "num_stages": launch.stages,
        "enable_fp_fusion": True,
    }
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=target, options=options)
    ptx = compiled.asm["ptx"]
    usage = _resource_usage(compiled.asm["cubin"])
    return Compiled(
        kernel=launch.kernel.__name__,
        chip=chip,
        warps=launch.warps,
        registers=usage["REG"],
        spilled=usage["STACK"] + usage["LOCAL"],
        spillable=_spillable(launch),
        shared=compiled.metadata.shared,
        products=next((name for text, name in _PRODUCTS.items() if text in ptx), ""),
        widest_load=_widest_load(ptx),
        has_dot="tt.dot" in compiled.asm["ttir"],
    )


def _specialised(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict]:
    """The types, constants and alignments that Triton's launcher would derive from arguments."""
    signature: dict[str, str] = {}
    constants = dict(launch.constants)
    attributes: dict[tuple[int, ...], list] = {}
    for index, value in enumerate(launch.arguments):
        parameter = launch.kernel.params[index]
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = _POINTERS[value.dtype]
            attributes[(index,)] = _DIVISIBLE
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        elif parameter.do_not_specialize:
            signature[parameter.name] = "i32"
        elif value == 1:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = 1
        else:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = _DIVISIBLE
    signature.update(dict.fromkeys(launch.constants, "constexpr"))
    return signature, constants, attributes


def _spillable(launch: Launch) -> int:
    """A product that adds its splits one after another needs their sum so far once a split."""
    constants = launch.constants
    if not constants.get("SERIAL") or constants["SPLITS"] == 1:
        return 0
    return 4 * constants["ROWS"] * constants["COLUMNS"] // (32 * launch.warps)


def _resource_usage(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said)}


def _widest_load(ptx: str) -> int:
    loads = [int(count or 1) * int(bits) // 8 for count, bits in _VECTOR.findall(ptx)]
    copies = [int(size, 16) for size in _COPY.findall(ptx)]
    return max(loads + copies, default=0)
