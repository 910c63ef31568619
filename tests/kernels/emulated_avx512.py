"""The AVX-512 kernels on a machine with AVX2 alone: `make test-avx512`.

The same sources, compiled so that AVX-512's instructions are computed by AVX2's (SIMDe and
emulated_avx512.h). What the kernels have in assembly is replaced in copies of the sources.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from headgate.kernels.cpu import build, library

PACKAGE = "libsimde-dev"  # Debian's and Ubuntu's name of SIMDe
_HEADER = Path(__file__).with_suffix(".h")

# By file: statements in assembly, and calls that do the same.
_ASSEMBLY = {
    "dot4.h": {
        '__asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));': (
            "sum = emulated::dpbusd(sum, w, x);"
        ),
        '__asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(y));': (
            "sum = emulated::dpwssd(sum, x, y);"
        ),
    },
    "byte_dots.h": {
        '__asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));': (
            "sum = emulated::dpbusd(sum, a, b);"
        ),
    },
    "bf16_pairs.h": {
        '__asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));': (
            "sum = emulated::dpbf16(sum, a, b);"
        ),
        '__asm__("vcvtneps2bf16 %1, %0" : "=v"(rounded) : "v"(x));': (
            "rounded = emulated::cvtneps_bf16(x);"
        ),
    },
}


def use(directory: Path) -> None:
    """This process's kernels are emulated ones from now on, compiled in `directory` (minutes)."""
    target = directory / "emulated.so"
    if not target.exists():
        compile_emulated(target)
    build.ensure_built = lambda: target
    library.load.cache_clear()


def compile_emulated(target: Path) -> None:
    """Raises BuildError."""
    compiler = shutil.which("g++")
    if compiler is None or not Path("/usr/include/simde").is_dir():
        pytest.exit(f"g++ or SIMDe is missing: install g++ and {PACKAGE}", returncode=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "SOURCES", _copied_sources(target.parent / "sources"))
        # The machine is asked what it has: everything.
        patch.setattr(build, "_FLAGS", (*build._FLAGS, "-D__builtin_cpu_supports(name)=1"))
        build.compile_library(compiler, target, _variants())


def _variants() -> build.Variants:
    variants = build.variants_of("x86_64")
    emulated = (*build._AVX2, "-include", str(_HEADER), "-Wno-psabi")
    variants["kernels"]["avx512"] = emulated
    variants["quantised"]["avx512"] = (*emulated, "-DHG_EMULATE_VNNI")
    return variants


def _copied_sources(folder: Path) -> Path:
    shutil.copytree(build.SOURCES, folder, ignore=shutil.ignore_patterns("*.so", "*.py", "__*"))
    for name, statements in _ASSEMBLY.items():
        text = (folder / name).read_text()
        for statement, call in statements.items():
            assert text.count(statement) == 1, f"{name} has another {statement}"
            text = text.replace(statement, call)
        (folder / name).write_text(text)
    return folder
