"""CUDA C++ cores compiled at first use, by NVRTC through CuPy, for machines with a GPU and no compiler.

The text is the same ``.cuh`` that the CUDA library is built from. CuPy's own compilation adds ``-ftz=true`` after all
options, which flushes subnormals, so this module calls NVRTC itself. Binaries are kept on disk, keyed by text, options,
architecture and NVRTC version, and written by rename. With a ``flock``, eight ranks compile a kernel once and not eight
times. The system releases the lock when its holder dies, by ``kill -9`` too.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from leanops._native import FOLDER

OPTIONS = ("-std=c++17", "--ftz=false", "--prec-div=true", "--prec-sqrt=true")
_INCLUDE = re.compile(r'^#include "([^"]+)"$', re.MULTILINE)


@dataclass(frozen=True)
class Kernel:
    """A kernel around a core's device function: each block runs ``body(parameters)`` with ``threads`` threads."""

    source: str  # a path below csrc/
    namespace: str
    body: str
    parameters: tuple[str, ...]  # C++ types
    threads: int
    resident: str = "1"  # blocks for each multiprocessor, a C++ constant


@cache
def flatten(path: Path) -> str:
    """A core's text with its own includes inserted, because NVRTC gets no include path."""

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
    """Where binaries and locks are: ``$XDG_CACHE_HOME/leanops/nvrtc``, by default below ``~/.cache``."""
    roots = os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache")
    # XDG says to ignore relative paths; a user without a home has one too. Files below /dev/null cannot be written.
    return Path(next(filter(os.path.isabs, roots), os.devnull), "leanops", "nvrtc")


@contextmanager
def exclusive(name: str) -> Iterator[None]:
    """Lock a name: one process at a time. Without a lock if the folder cannot be written or supports no locks."""
    with ExitStack() as stack:
        with suppress(OSError):
            cache_folder().mkdir(parents=True, exist_ok=True)
            handle = stack.enter_context(open(cache_folder() / f"{name}.lock", "w"))
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def kept(key: str, make: Callable[[], bytes]) -> bytes:
    """The result of ``make``, made once for all processes. The file starts with a hash that reveals damage."""
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    file = cache_folder() / f"{name}.bin"
    with exclusive(name):
        with suppress(OSError):
            found = file.read_bytes()
            if hashlib.sha256(found[32:]).digest() == found[:32]:
                return found[32:]
        made = make()
        with suppress(OSError):  # a folder that cannot be written, or a full disk
            part = file.with_suffix(f".{os.getpid()}")
            try:
                part.write_bytes(hashlib.sha256(made).digest() + made)
                part.replace(file)
            finally:
                part.unlink(missing_ok=True)
        return made


def target(nvrtc: Any, capability: int) -> str:
    """The architecture to compile for: the device's, or PTX for the newest one below it that NVRTC knows."""
    known = nvrtc.getSupportedArchs()
    return f"sm_{capability}" if capability in known else f"compute_{max(a for a in known if a < capability)}"


def compiled(nvrtc: Any, text: str, arch: str, options: Sequence[str] = OPTIONS) -> bytes:
    """A program's binary, or its PTX for ``compute_…``. ``nvrtc`` has the functions of ``cupy.cuda.nvrtc``."""
    handle = nvrtc.createProgram(text, "leanops.cu", (), ())
    try:
        nvrtc.compileProgram(handle, (*options, f"--gpu-architecture={arch}"))
        binary: bytes = nvrtc.getCUBIN(handle) if arch.startswith("sm_") else nvrtc.getPTX(handle)
    except nvrtc.NVRTCError as error:
        raise RuntimeError(f"leanops: NVRTC: {error}: {nvrtc.getProgramLog(handle)}") from None
    finally:
        nvrtc.destroyProgram(handle)
    return binary


@cache
def _loaded(kernel: Kernel, device: int) -> Any:
    import cupy
    from cupy.cuda import nvrtc

    major, minor = torch.cuda.get_device_capability(device)
    text, arch = program(kernel), target(nvrtc, 10 * major + minor)
    key = "\n".join(map(str, (text, *OPTIONS, arch, *nvrtc.getVersion())))
    binary = kept(key, lambda: compiled(nvrtc, text, arch))
    with cupy.cuda.Device(device):
        module = cupy.cuda.Module()
        module.load(binary)
        return module.get_function("entry")


@cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def processors(like: torch.Tensor) -> int:
    """Multiprocessors of a tensor's device."""
    return _processors(like.get_device())


def zeros(count: int, like: torch.Tensor) -> torch.Tensor:
    """int32 zeros on the device of ``like``, [count], by a memset on torch's current stream, without a kernel."""
    words = torch.empty(count, dtype=torch.int32, device=like.device)
    if not like.is_cuda or not count:
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
    function = _loaded(kernel, device)
    stream = cupy.cuda.ExternalStream(torch.cuda.current_stream(device).cuda_stream, device)
    with cupy.cuda.Device(device), stream:
        function((grid,), (kernel.threads,), tuple(arguments))
