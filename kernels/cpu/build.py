"""Compiles the C++ kernels into one shared library: `python -m headgate.kernels.cpu.build`.

The library's name carries a digest of the sources and the flags, so a change of them makes a new
one, and a library built at set-up needs no compiler later. It lies beside the sources, or in the
user's cache directory where those cannot be written. Several processes may ask at once: one
compiles, the others wait for it. Loading is `library.py`'s.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).resolve().parent

_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-pthread",
    "-fvisibility=hidden",
    # Sums are alike on every path only if the compiler fuses no product and sum unasked.
    "-ffp-contract=off",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
    # GCC 12 takes the deliberately undefined operands of its own intrinsics for a mistake.
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
)
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
Variants = dict[str, dict[str, tuple[str, ...]]]

# Sources that are compiled once for all instruction sets.
_SHARED_SOURCES = (
    "interface",
    "quantised_interface",
    "product",
    "thread_pool",
    "shared_sum",
    "replay",
    "step_rows",
)
# Sources that are compiled once for each instruction set, and with which flags.
_VARIANTS: Variants = {
    "kernels": {"generic": (), "avx2": _AVX2, "avx512": _AVX512},
    "quantised": {
        "generic": (),
        "avx2": _AVX2,
        "avx512": (*_AVX512, "-mavx512vnni"),
        "neon": ("-march=armv8.2-a+dotprod",),
    },
}
_X86, _ARM = ("x86_64", "AMD64"), ("aarch64", "arm64")
_MACHINES = {"avx2": _X86, "avx512": _X86, "neon": _ARM}  # generic: any


class BuildError(RuntimeError):
    """No compiler, or the compiler refused; the message is one for the user."""


def ensure_built() -> Path:
    """Path of an up-to-date library, compiled now if there is none. Raises BuildError."""
    name = f"headgate_cpu-{_digest()}.so"
    for directory in (SOURCES, _cache_directory()):
        if (directory / name).is_file():
            return directory / name
    compiler = _compiler()
    if compiler is None:
        raise BuildError("no C++ compiler found (g++, c++ or clang++, or the one named by CXX)")
    target = _writable_directory() / name
    with (target.parent / ".build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_file():
            compile_library(compiler, target, variants_of(platform.machine()))
            _remove_others(target)
    return target


def _compiler() -> str | None:
    named = os.environ.get("CXX")
    for candidate in (named,) if named else ("g++", "c++", "clang++"):
        found = shutil.which(candidate)
        if found:
            return found
    return None


def _digest() -> str:
    digest = hashlib.sha256(repr((_FLAGS, _VARIANTS, platform.machine())).encode())
    for path in sorted(SOURCES.glob("*.h")) + sorted(SOURCES.glob("*.cpp")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "headgate" / "kernels"


def _writable_directory() -> Path:
    for directory in (SOURCES, _cache_directory()):
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=directory):
                return directory
        except OSError:
            continue
    raise BuildError(f"neither {SOURCES} nor {_cache_directory()} can be written")


def variants_of(machine: str) -> Variants:
    """The instruction sets of a kind of machine, as `platform.machine()` names it."""
    return {
        source: {
            name: flags
            for name, flags in variants.items()
            if machine in _MACHINES.get(name, (machine,))
        }
        for source, variants in _VARIANTS.items()
    }


def compile_library(compiler: str, target: Path, variants: Variants) -> None:
    """Compiles each source for itself, several at a time, and links them to `target`."""
    with tempfile.TemporaryDirectory(prefix="headgate-build-") as scratch:
        objects = Path(scratch)
        commands: list[tuple[str, ...]] = []
        for source in _SHARED_SOURCES:
            target_object = str(objects / f"{source}.o")
            commands.append(("-c", str(SOURCES / f"{source}.cpp"), "-o", target_object))
        for source, sets in variants.items():
            for name, flags in sets.items():
                names = (f"-DHG_TABLE={source}_{name}", f"-DHG_NAME={name}")
                target_object = str(objects / f"{source}_{name}.o")
                source_file = str(SOURCES / f"{source}.cpp")
                commands.append((*flags, *names, "-c", source_file, "-o", target_object))
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(lambda command: _run(compiler, *_FLAGS, *command), commands))
        # Linked under a name of its own, then renamed: no process ever loads half a library.
        partial = target.with_name(f"{target.name}.{os.getpid()}")
        try:
            parts = sorted(str(path) for path in objects.glob("*.o"))
            _run(compiler, *_FLAGS, "-shared", *parts, "-o", str(partial))
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)


def _run(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = (result.stderr or result.stdout).strip().splitlines()
        last = lines[-1] if lines else "no message"
        why = next((line for line in lines if "error" in line), last)
        raise BuildError(f"{command[0]} could not compile the CPU kernels: {why}")


def _remove_others(keep: Path) -> None:
    """Libraries of older sources. A process that has one loaded keeps it."""
    for path in keep.parent.glob("headgate_cpu-*.so"):
        if path != keep:
            path.unlink(missing_ok=True)


def main() -> int:
    try:
        print(f"CPU kernels: {ensure_built()}")
    except BuildError as error:
        print(f"CPU kernels not built: {error}; plain torch will be used", file=sys.stderr)
    # A machine without a compiler still serves, so set-up goes on.
    return 0


if __name__ == "__main__":
    sys.exit(main())
