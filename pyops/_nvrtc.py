"""CUDA C++ cores compiled at first use, by NVRTC through CuPy, for machines with a GPU and no compiler.

The text is the same ``.cuh`` that the CUDA library is built from. CuPy keeps the binaries on disk, keyed by source,
options, architecture and NVRTC version, and writes them by rename, so a second cache here could only go stale. What
CuPy lacks is mutual exclusion: without it, eight ranks compile the same kernel eight times. A ``flock`` adds it; the
system releases it when its holder dies, by ``kill -9`` too.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from leanops._native import FOLDER

OPTIONS = ("-std=c++17",)
_INCLUDE = re.compile(r'^#include "([^"]+)"$', re.MULTILINE)


@dataclass(frozen=True)
class Kernel:
    """A device function of a core, made a kernel: ``body(parameters)`` run by ``threads`` threads a block."""

    source: str  # below csrc/
    namespace: str
    body: str
    parameters: tuple[str, ...]  # C++ types
    threads: int
    resident: str = "1"  # blocks that share a multiprocessor, a C++ constant


@cache
def flatten(path: Path) -> str:
    """A core's text with its own includes in place, as NVRTC has no include path to look at."""

    def include(match: re.Match[str]) -> str:
        return flatten((path.parent / match[1]).resolve())

    return _INCLUDE.sub(include, path.read_text())


def program(kernel: Kernel, folder: Path = FOLDER / "csrc") -> str:
    """The text to compile: the core and one ``extern "C"`` entry."""
    names = [f"a{i}" for i in range(len(kernel.parameters))]
    parameters = ", ".join(f"{t} {n}" for t, n in zip(kernel.parameters, names, strict=True))
    return (
        f"{flatten(folder / kernel.source)}\n"
        f"using namespace {kernel.namespace};\n"
        f'extern "C" __global__ void __launch_bounds__({kernel.threads}, {kernel.resident}) entry({parameters}) {{\n'
        f"  {kernel.body}({', '.join(names)});\n}}\n"
    )


def cache_folder() -> Path:
    """Where the locks are: ``$XDG_CACHE_HOME/leanops/nvrtc``, by default below ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "leanops", "nvrtc")


@contextmanager
def exclusive(name: str) -> Iterator[None]:
    """One process at a time, per name. Goes ahead alone where the folder cannot be written."""
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        handle = open(cache_folder() / f"{name}.lock", "w")  # noqa: SIM115
    except OSError:
        yield
        return
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@cache
def _compiled(kernel: Kernel, device: int) -> Any:
    import cupy

    text = program(kernel)
    with cupy.cuda.Device(device), exclusive(hashlib.sha256(text.encode()).hexdigest()[:32]):
        return cupy.RawModule(code=text, options=OPTIONS).get_function("entry")


@cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def processors(like: torch.Tensor) -> int:
    """Multiprocessors of a tensor's device."""
    return _processors(like.get_device())


def zeros(count: int, like: torch.Tensor) -> torch.Tensor:
    """Words of 4 zero bytes on the device of ``like``, by a memset on torch's current stream: no kernel."""
    words = torch.empty(count, dtype=torch.int32, device=like.device)
    if not like.is_cuda:
        return words.zero_()
    import cupy

    device = like.get_device()
    stream = torch.cuda.current_stream(device).cuda_stream
    with cupy.cuda.Device(device):
        cupy.cuda.runtime.memsetAsync(words.data_ptr(), 0, 4 * count, stream)
    return words


def launch(kernel: Kernel, like: torch.Tensor, grid: int, arguments: Sequence[Any]) -> None:
    """Run a kernel on the device and torch's current stream of ``like``. Arguments: NumPy scalars, or arrays of size
    one that are passed by value."""
    import cupy

    device = like.get_device()
    function = _compiled(kernel, device)
    stream = cupy.cuda.ExternalStream(torch.cuda.current_stream(device).cuda_stream, device)
    with cupy.cuda.Device(device), stream:
        function((grid,), (kernel.threads,), tuple(arguments))
