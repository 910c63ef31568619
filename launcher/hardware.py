"""What this process may use: cores, memory, shared memory and GPUs, container limits included.

It reads files and asks nvidia-smi, imports no torch, and decides nothing (autosize.py does).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

_NO_LIMIT = 1 << 60  # cgroup v1 writes a huge number where there is no limit
_NVIDIA_SMI_SECONDS = 20


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU that the shards can see."""

    name: str
    total_bytes: int
    free_bytes: int
    capability: float  # 8.0 for an A100


@dataclass(frozen=True, slots=True)
class Hardware:
    """What there is to divide. Sizes in bytes."""

    cores: int
    memory_available: int  # what new processes can take before a limit or the machine is full
    memory_limit: int  # of the container, or the machine's whole memory
    shm_free: int
    wide_vectors: bool = False  # a core multiplies two vectors of 16 floats in a cycle
    gpus: tuple[Gpu, ...] = ()
    gpu_note: str = ""  # why GPUs that are there are not used


def find_hardware(environment: Mapping[str, str] = os.environ) -> Hardware:
    """The hardware of this machine within this process' limits."""
    limits = CgroupLimits()
    gpus, note = find_gpus(environment)
    available, total = _memory(limits)
    return Hardware(
        cores=limits.cores(),
        memory_available=available,
        memory_limit=total,
        shm_free=_free_bytes("/dev/shm"),
        wide_vectors=has_wide_vectors(_read(Path("/proc/cpuinfo"))),
        gpus=gpus,
        gpu_note=note,
    )


class CgroupLimits:
    """The limits of this process' control groups, version 1 or 2.

    A limit holds for all below it, so each one is the least of the group's and its ancestors'.
    `root` is where the file system is looked at (tests make one).
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._cgroup = root / "sys/fs/cgroup"
        self._proc = root / "proc"

    def cores(self) -> int:
        """Whole cores: affinity and cpuset, cut by the CPU quota, at least 1."""
        try:
            allowed = len(os.sched_getaffinity(0))
        except AttributeError:  # not on this operating system
            allowed = os.cpu_count() or 1
        cpuset = self._cpuset()
        if cpuset:
            allowed = min(allowed, cpuset)
        quota = self.cpu_quota()
        return max(1, min(allowed, int(quota)) if quota else allowed)

    def cpu_quota(self) -> float | None:
        """Cores that the quota grants, possibly a fraction; None: no quota."""
        quotas = []
        for folder in self._folders(""):
            words = _read(folder / "cpu.max").split()
            if len(words) == 2 and words[0] != "max":
                quotas.append(int(words[0]) / int(words[1]))
        for folder in self._folders("cpu"):
            quota = _read_int(folder / "cpu.cfs_quota_us")
            period = _read_int(folder / "cpu.cfs_period_us")
            if quota and period and quota > 0:
                quotas.append(quota / period)
        return min(quotas, default=None)

    def memory_limit(self) -> int | None:
        """The least memory limit in bytes; None: no limit."""
        return min((limit for limit, _ in self._memory_limits()), default=None)

    def memory_room(self) -> int | None:
        """Bytes left under the tightest limit, caches that can be dropped not counted as used."""
        return min((max(0, limit - used) for limit, used in self._memory_limits()), default=None)

    def _memory_limits(self) -> Iterator[tuple[int, int]]:
        names = (
            ("", "memory.max", "memory.current", "inactive_file"),
            ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        )
        for controller, limit_file, used_file, cache_key in names:
            for folder in self._folders(controller):
                limit = _read_int(folder / limit_file)
                if limit is None or limit >= _NO_LIMIT:
                    continue
                used = _read_int(folder / used_file) or 0
                cache = _key_value(_read(folder / "memory.stat"), cache_key)
                yield limit, max(0, used - cache)

    def _cpuset(self) -> int | None:
        for controller, name in (("", "cpuset.cpus.effective"), ("cpuset", "cpuset.cpus")):
            for folder in self._folders(controller):
                text = _read(folder / name)
                if text:
                    return count_cpus(text)
        return None

    def _folders(self, controller: str) -> list[Path]:
        """The group's folder and its ancestors'; controller "" means version 2."""
        mount = self._cgroup / controller if controller else self._cgroup
        path = self._paths.get(controller)
        if path is None:
            return []
        folders = []
        folder = mount / path.lstrip("/")
        while True:
            folders.append(folder)
            if folder == mount or mount not in folder.parents:
                return folders
            folder = folder.parent

    @cached_property
    def _paths(self) -> dict[str, str]:
        paths = {}
        for line in _read(self._proc / "self/cgroup").splitlines():
            _, controllers, path = line.split(":", 2)
            for controller in controllers.split(","):
                paths[controller] = path
        return paths


def has_wide_vectors(cpuinfo: str) -> bool:
    """Whether a core multiplies two vectors of 16 floats in a cycle, by what /proc/cpuinfo says.

    Those with AVX-512 do, but for AMD's family 25 (Zen 4), which takes two cycles for it.
    """
    facts: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    zen4 = (facts.get("vendor_id"), facts.get("cpu family")) == ("AuthenticAMD", "25")
    return "avx512f" in facts.get("flags", "").split() and not zen4


def count_cpus(text: str) -> int:
    """Number of CPUs in a list such as "0-3,8"."""
    total = 0
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        total += int(last or first) - int(first) + 1
    return total


def find_gpus(environment: Mapping[str, str]) -> tuple[tuple[Gpu, ...], str]:
    """The GPUs that shards would see, and why those of the machine are not used if they are not."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        visible = environment.get("NVIDIA_VISIBLE_DEVICES", "all")
        if visible in ("void", "none", ""):
            return (), ""
    gpus = _ask_nvidia_smi()
    if not gpus:
        return (), ""
    if visible.strip() in ("", "-1", "NoDevFiles"):
        return (), "CUDA_VISIBLE_DEVICES hides the GPUs"
    if not torch_has_cuda():
        return (), "the installed PyTorch is a build without CUDA"
    if visible == "all":
        return gpus, ""
    wanted = [word.strip() for word in visible.split(",") if word.strip()]
    chosen = [
        gpus[int(word)] if word.isdigit() and int(word) < len(gpus) else gpus[0] for word in wanted
    ]
    return tuple(chosen), ""


def torch_has_cuda() -> bool:
    """Whether the installed PyTorch can use GPUs, found without importing it."""
    spec = find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return False
    for folder in spec.submodule_search_locations:
        for line in _read(Path(folder) / "version.py").splitlines():
            if line.startswith("cuda"):
                return not line.rstrip().endswith("None")
    return False


def _ask_nvidia_smi() -> tuple[Gpu, ...]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    query = "name,memory.total,memory.free,compute_cap"
    try:
        answer = subprocess.run(
            [program, f"--query-gpu={query}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=_NVIDIA_SMI_SECONDS,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return parse_nvidia_smi(answer)


def parse_nvidia_smi(text: str) -> tuple[Gpu, ...]:
    """The rows of `name, total MiB, free MiB, capability`; rows of another form are skipped."""
    gpus = []
    for line in text.splitlines():
        words = [word.strip() for word in line.rsplit(",", 3)]
        try:
            name, total, free, capability = words
            gpus.append(Gpu(name, int(total) << 20, int(free) << 20, float(capability)))
        except ValueError:
            continue
    return tuple(gpus)


def _memory(limits: CgroupLimits) -> tuple[int, int]:
    """(available, total) bytes of the machine, within the container's limit."""
    if sys.platform == "linux":
        info = _read(Path("/proc/meminfo"))
        total = _key_value(info, "MemTotal:") * 1024
        available = _key_value(info, "MemAvailable:") * 1024
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        available = total
    limit, room = limits.memory_limit(), limits.memory_room()
    if limit is not None and room is not None:
        total, available = min(total, limit), min(available, room)
    return available, total


def _free_bytes(folder: str) -> int:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _read_int(path: Path) -> int | None:
    try:
        return int(_read(path))
    except ValueError:  # absent, or "max"
        return None


def _key_value(text: str, key: str) -> int:
    """The number behind `key` in lines of "key number ..."; 0 if it is not there."""
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == key:
            return int(words[1])
    return 0
