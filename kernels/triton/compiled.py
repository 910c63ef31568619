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

# Shared memory that one program may have, in bytes.
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}

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
    registers: int  # per thread
    spilled: int  # bytes per thread that did not fit
    shared: int  # bytes of shared memory per program
    products: str  # the tensor cores' instruction, "" where none is used
    widest_load: int  # bytes
    has_dot: bool

    @property
    def problems(self) -> list[str]:
        """What must not be; nothing where all is well."""
        found = []
        if self.spilled:
            found.append(f"{self.spilled} bytes of registers spilled")
        if self.shared > SHARED_LIMIT[self.chip]:
            found.append(f"{self.shared} bytes of shared memory, {SHARED_LIMIT[self.chip]} allowed")
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
        registers=usage["REG"],
        spilled=usage["STACK"] + usage["LOCAL"],
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
