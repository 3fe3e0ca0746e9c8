"""How C++ and CUDA are compiled: the tools of this machine, the flags, the ninja file, and how many jobs run at a time.

``setup.py`` and ``tests/native/build.py`` import it. It needs the standard library alone: isolated builds have no more.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

OLDEST_TORCH = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # torch 2.10
# They come after the words of CXX, so that an -Ofast in CXX changes no result. CXXFLAGS is not read, for that reason.
CXX_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-fast-math", "-ffp-contract=off", "-Wall",
             "-Wextra")  # fmt: skip
NVCC_FLAGS = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-DUSE_CUDA")
ISA_FLAGS = {
    "baseline": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
}

GIB = 1 << 30
MEMORY = Path("/proc/meminfo")
MEMORY_LIMITS = [Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")]
FIND_TORCH = "import importlib.util; print(importlib.util.find_spec('torch').origin)"
CAPABILITIES = (
    "from torch import cuda; print(*('%d.%d' % cuda.get_device_capability(i) for i in range(cuda.device_count())))"
)


class Unavailable(Exception):
    """A library cannot be built here. The text says why, and what to do."""


def say(line: str) -> None:
    """Print a line at once, on a terminal that may show ASCII alone."""
    print(line.encode("ascii", "backslashreplace").decode(), flush=True)


def ask(*command: str) -> str:
    """The output of a command that runs outside of pip's isolated build environment; "" if it fails."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    try:
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, errors="replace", check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def find_cxx() -> list[str]:
    """The C++ compiler as words: CXX may hold a launcher before it and flags after it."""
    requested = os.environ.get("CXX", "").strip()
    try:
        words = [requested] if shutil.which(requested) else shlex.split(requested)
    except ValueError as error:
        raise Unavailable(f"CXX={requested} cannot be split into words: {error}; correct CXX") from None
    for candidate in [words] if words else [["g++"], ["clang++"]]:
        if found := shutil.which(candidate[0]):
            return [found, *candidate[1:]]
    looked = f"CXX={requested}" if requested else "CXX, g++ and clang++"
    raise Unavailable(f"no C++ compiler found (looked at {looked}); install g++ or clang++, or set CXX")


def nvcc_host_flags(cxx: list[str]) -> list[str]:
    """nvcc's flags for a host compiler. ``-ccbin`` takes one word, so a launcher is left out."""
    end = next((i for i, word in enumerate(cxx) if word.startswith("-")), len(cxx))
    return ["-ccbin", cxx[end - 1], *("-Xcompiler=" + word.replace(",", r"\,") for word in cxx[end:])]


def find_nvcc() -> Path:
    home = os.environ.get("CUDA_HOME")
    folders = f"{home}/bin" if home else f"/usr/local/cuda/bin{os.pathsep}{os.environ.get('PATH', '')}"
    if nvcc := shutil.which("nvcc", path=folders):
        return Path(nvcc).resolve()
    looked = f"CUDA_HOME={home}" if home else "/usr/local/cuda and PATH"
    raise Unavailable(f"no nvcc found (looked at {looked})")


def find_ninja() -> str:
    folders = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    if ninja := shutil.which("ninja", path=folders):
        return ninja
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # installed by --user, --target or a .pth file
        for file in importlib.metadata.files("ninja") or ():
            if file.stem == "ninja" and os.access(file.locate(), os.X_OK) and Path(file.locate()).is_file():
                return str(file.locate())
    raise Unavailable("ninja is not installed; pip install ninja")


def find_torch() -> Path:
    """The folder of torch. An isolated build cannot import torch, but the headers are all that it needs."""
    spec = importlib.util.find_spec("torch")
    origin = spec.origin if spec else ask(sys.executable, "-c", FIND_TORCH).strip()
    if origin and (Path(origin).parent / "include" / "torch").exists():
        return Path(origin).parent
    raise Unavailable(
        f"torch is not installed for {sys.executable}; install torch first, and build with --no-build-isolation "
        "where the front end is not pip"
    )


def cuda_archs() -> list[str]:
    """The architectures to compile for, such as 80 and 90, the newest last."""
    requested = re.findall(r"[^\s;,]+", os.environ.get("LEANOPS_CUDA_ARCHS", "80;90;100"))
    if not requested:
        raise Unavailable("LEANOPS_CUDA_ARCHS is empty")
    archs = {arch for word in requested for arch in (_native_archs() if word == "native" else [word.replace(".", "")])}
    if unknown := [arch for arch in archs if not re.fullmatch(r"\d+[af]?", arch)]:
        raise Unavailable(f"LEANOPS_CUDA_ARCHS must be native or architectures such as 80;90, got {', '.join(unknown)}")
    return sorted(archs, key=lambda arch: (int(arch.rstrip("af")), arch))


def _native_archs() -> list[str]:
    smi = ask("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    for answer in (smi, ask(sys.executable, "-c", CAPABILITIES)):
        if found := re.findall(r"\b(\d+)\.(\d)\b", answer):
            return [major + minor for major, minor in found]
    raise Unavailable(
        "LEANOPS_CUDA_ARCHS is native, and neither nvidia-smi nor torch finds a GPU; name the architecture, such as 90"
    )


# --- the ninja file ---------------------------------------------------------------------------------------------------


class Object(NamedTuple):
    """One compilation. ``variant`` distinguishes compilations of the same source."""

    source: Path  # relative to the folder in which ninja runs
    compiler: Sequence[str | Path]
    flags: Sequence[str | Path]
    variant: str = ""

    @property
    def name(self) -> str:
        """The name of the object file, such as ``csrc.zo.zo_kernels.avx2.o``."""
        return ".".join(filter(None, (*self.source.with_suffix("").parts, self.variant, "o")))


def kernel_flags() -> dict[str, tuple[str, ...]]:
    """The flags with which a kernel file is compiled for each instruction set of this kind of processor."""
    sets = ISA_FLAGS if platform.machine() == "x86_64" else {"baseline": ISA_FLAGS["baseline"]}
    return {isa: (*flags, f"-DLEANOPS_ISA={isa}") for isa, flags in sets.items()}


def torch_include_flags(include: Path) -> list[str]:
    """The flags of a compilation against torch's headers, which lie in ``include``."""
    folders = (include, include / "torch/csrc/api/include")  # -I for them would show the warnings in their headers
    return ["-Icsrc", *(word for folder in folders for word in ("-isystem", str(folder))), OLDEST_TORCH]


def _quote(words: Sequence[str | Path]) -> str:
    """Words of a command, quoted for the shell and for ninja."""
    return shlex.join(map(str, words)).replace("$", "$$")


def _escape(path: Path) -> str:
    """A path outside of a command."""
    return re.sub("[$ :]", r"$\g<0>", str(path))


def ninja_file(
    folder: Path, objects: Sequence[Object], output: Path, link: Sequence[str | Path], linked: Sequence[Path] = ()
) -> bytes:
    """The content of ``folder/build.ninja``. It compiles the objects into ``folder``.

    The C++ compiler links them, and the object files in ``linked``, into ``output`` with the flags ``link``.
    """
    lines = [
        f"builddir = {_escape(folder)}",
        "rule compile",
        " command = $compiler -MD -MF $out.d $flags -c $in -o $out",
        " depfile = $out.d",
        " deps = gcc",
        " description = $shown",
        "rule link",
        f" command = {_quote([*find_cxx(), *CXX_FLAGS])} -o $out $in {_quote(link)}",
        f" description = {output.name}",
    ]
    for item in objects:
        lines += [
            f"build {_escape(folder / item.name)}: compile {_escape(item.source)}",
            f" compiler = {_quote(item.compiler)}",
            f" flags = {_quote(item.flags)}",
            f" shown = {', '.join(filter(None, (str(item.source), item.variant)))}",
        ]
    inputs = [*(folder / item.name for item in objects), *linked]
    lines += [f"build {_escape(output)}: link {' '.join(map(_escape, inputs))}", ""]
    return os.fsencode("\n".join(lines))


# --- running it -------------------------------------------------------------------------------------------------------


def parallel(files: int) -> tuple[int, int]:
    """How many of ``files`` are compiled at a time, and for how many architectures each nvcc compiles at a time.

    Both are bounded by the cores and by MAX_JOBS, or else by the memory: 1 GiB a compilation (measured with g++ 12 and
    nvcc 13.0 on the largest files: 0.35 GiB for g++, 0.44 GiB for one architecture in nvcc).
    """
    limits = []
    with contextlib.suppress(OSError):
        available = re.search(r"MemAvailable:\s+(\d+) kB", MEMORY.read_text())
        limits = [int(available[1]) * 1024] if available else []
    for limit in MEMORY_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # no such file, or the word max
            limits.append(int(limit.read_text()))
    requested = os.environ.get("MAX_JOBS", "")
    most = max(1, int(requested) if requested.isdecimal() else min(limits, default=GIB) // GIB)
    cores = len(os.sched_getaffinity(0))
    jobs = min(files, cores, most)
    return jobs, min(cores, most // jobs)


def run_ninja(file: Path, library: str, files: int) -> None:
    """Build what ``file`` describes, and print each line as it comes, since ``pip install -v`` shows it at once."""
    jobs, archs = parallel(files)
    say(f"leanops: building the {library} library: {files} files, {jobs} at a time")
    # nvcc takes its threads from the environment: in its command, which ninja compares, they would cause a rebuild
    environment = os.environ | {"LC_ALL": "C", "NINJA_STATUS": f"leanops: {library} library [%f/%t, %e s] "}
    if shlex.quote(tempfile.gettempdir()) != tempfile.gettempdir():
        archs = 1  # nvcc does not quote this folder in what its threads run
    environment["NVCC_APPEND_FLAGS"] = f"{os.environ.get('NVCC_APPEND_FLAGS', '')} --threads {archs}"
    command = [find_ninja(), "-j", str(jobs), "-f", str(file)]
    lines = []
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        for line in process.stdout or ():
            lines.append(line.decode(errors="replace").rstrip())
            say(lines[-1])
    if process.returncode:
        errors = [line for line in lines if re.search(r"\berror ?:", line)]
        errors = errors or [line for line in lines if not re.search("^leanops: | -o ", line)]
        raise Unavailable(
            f"the build failed: {' | '.join([*dict.fromkeys(errors)][:3])}; pip install -v shows all of its output"
        )
