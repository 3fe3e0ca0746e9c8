"""All conditions of a measurement: the machine, its software, and the source of the operator."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

import torch

# instruction sets that select a kernel, with their names in /proc/cpuinfo
_ISA_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "avx512_fp16",
              "avx512_vnni", "amx_tile", "amx_bf16", "asimd", "sve", "bf16")  # fmt: skip


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError):
        return ""


@cache
def _cpuinfo() -> dict[str, str]:
    fields: dict[str, str] = {}
    for line in _read("/proc/cpuinfo").splitlines():
        name, colon, value = line.partition(":")
        if colon:
            fields.setdefault(name.strip(), value.strip())
    return fields


def cpu_name() -> str:
    info = _cpuinfo()
    name = info.get("model name") or platform.processor() or platform.machine() or "unknown"
    if "cpu family" in info:
        name += f" (family {info['cpu family']}, model {info.get('model', '?')})"
    return name


def isa() -> list[str]:
    flags = set((_cpuinfo().get("flags") or _cpuinfo().get("Features", "")).split())
    return [flag for flag in _ISA_FLAGS if flag in flags]


def caches() -> dict[str, int]:
    """Bytes of the first core's data caches, by level: ``{"L1": 49152, "L2": ..., "L3": ...}``."""
    sizes: dict[str, int] = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        if _read(index / "type").strip() == "Instruction":
            continue
        text = _read(index / "size").strip()
        scale = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
        digits = text.rstrip("KMG")
        if digits.isdigit():
            sizes[f"L{_read(index / 'level').strip()}"] = int(digits) * scale
    return sizes


def last_level_cache(device: torch.device) -> int:
    """Bytes of the cache nearest to memory; 32 MiB if the system does not report it."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    return max(caches().values(), default=32 << 20)


def memory_available(device: torch.device) -> int:
    """Bytes that can still be allocated, within a container's limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = [int(line.split()[1]) << 10 for line in _read("/proc/meminfo").splitlines() if line.startswith("MemAvail")]
    limit, used = _read("/sys/fs/cgroup/memory.max").strip(), _read("/sys/fs/cgroup/memory.current").strip()
    if limit.isdigit() and used.isdigit():
        free.append(max(int(limit) - int(used), 0))
    return min(free, default=4 << 30)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def driver_version() -> str | None:
    """The version of the NVIDIA driver, from nvidia-smi."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return output.split("\n")[0].strip() or None


def source_hash(files: Iterable[Path]) -> str:
    """Sixteen hex digits over the names and contents of the files."""
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda f: f.name):
        content = file.read_bytes()
        digest.update(f"{file.name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


def software() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    versions["cuda"] = torch.version.cuda
    versions["triton"] = package_version("triton")
    return versions


def cpu() -> dict[str, object]:
    return {
        "name": cpu_name(),
        "isa": isa(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "caches": caches(),
    }


def gpu(device: torch.device) -> dict[str, object]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "sm": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "l2": properties.L2_cache_size,
        "driver": driver_version(),
    }


def fingerprint(device: torch.device | str, sources: Mapping[str, str] | None = None) -> dict[str, object]:
    """All that a time on ``device`` depends on. ``sources`` has each operator's source hash.

    Measurements whose fingerprints differ in any field cannot be compared.
    """
    device = torch.device(device)
    machine = {"gpu": gpu(device)} if device.type == "cuda" else {"cpu": cpu()}
    return {**machine, "system": platform.system(), "software": software(), "sources": dict(sources or {})}
