"""Finds and loads the compiled libraries, and keeps the reason for each backend that is absent."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from leanops import _registry

FOLDER = Path(__file__).parent / "lib"


@dataclass(frozen=True)
class Backend:
    """A backend, whether it is in use, and the reason where it is not."""

    name: str
    loaded: bool
    detail: str


_backends: dict[str, Backend] = {}


def version() -> str:
    return importlib.metadata.version("leanops")


@cache
def build_report() -> dict[str, dict[str, object]]:
    """What the build wrote about each library."""
    try:
        report: dict[str, dict[str, object]] = json.loads((FOLDER / "build.json").read_text())
    except FileNotFoundError:
        return {}
    return report


def disabled() -> frozenset[str]:
    """Backends that LEANOPS_DISABLE names: ``cpu,cuda,triton,nvrtc`` or any of them."""
    return frozenset(filter(None, os.environ.get("LEANOPS_DISABLE", "").replace(" ", "").split(",")))


def _why_not(library: str) -> str | None:
    """Why a native library cannot serve, or None."""
    if library in disabled():
        return "switched off by LEANOPS_DISABLE"
    if library == "cuda" and torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA"
    if not (FOLDER / f"libleanops_{library}.so").exists():
        return str(build_report().get(library, {}).get("reason", "the library is not in this installation"))
    return None


def _load_library(library: str) -> Backend:
    reason = _why_not(library)
    if reason is not None:
        return Backend(library, False, reason)
    path = FOLDER / f"libleanops_{library}.so"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return Backend(library, False, f"the library does not load: {error}")
    if library == "cuda":
        return Backend(library, True, f"built with torch's stable ABI, runs on CUDA {torch.version.cuda}")
    if problem := _ask_cpu_library("leanops_cpu_isa_error"):
        raise ValueError(f"leanops: {problem}")
    return Backend(library, True, cpu_isa())


def _ask_cpu_library(question: str) -> str:
    entry = getattr(ctypes.CDLL(str(FOLDER / "libleanops_cpu.so")), question)
    entry.restype = ctypes.c_char_p
    answer: bytes = entry()
    return answer.decode()


def cpu_isa() -> str:
    """The instruction set that the loaded CPU library chose: ``baseline``, ``avx2`` or ``avx512``."""
    return _ask_cpu_library("leanops_cpu_isa")


def _python_backend(name: str, package: str, serves: str | None) -> Backend:
    """A backend of Python launchers: registered for CUDA where no backend before it serves."""
    if name in disabled():
        return Backend(name, False, "switched off by LEANOPS_DISABLE")
    if importlib.util.find_spec(package) is None:
        return Backend(name, False, f"{package} is not installed")
    if torch.version.cuda is None:
        return Backend(name, False, f"this torch ({torch.__version__}) is built without CUDA")
    if serves is not None:
        return Backend(name, False, f"available; {serves} serves the CUDA operators")
    for spec in _registry.specs():
        if name in spec.backends:
            _registry.implement(spec.name, "CUDA", _lazy(spec.backends[name]))
    return Backend(name, True, "serves the CUDA operators")


def _lazy(loader: _registry.Loader) -> _registry.Kernel:
    """The launcher's module (and Triton or CuPy with it) is imported at the first call, not with leanops."""
    launcher = cache(loader)

    def kernel(*args: object) -> object:
        return launcher()(*args)

    return kernel


def load() -> None:
    """Load what is there, once. On CUDA the order of preference is native, Triton, NVRTC."""
    if _backends:
        return
    _backends["cpu"] = _load_library("cpu")
    _backends["cuda"] = _load_library("cuda")
    server = "the CUDA library" if _backends["cuda"].loaded else None
    for name, package in (("triton", "triton"), ("nvrtc", "cupy")):
        _backends[name] = _python_backend(name, package, server)
        if _backends[name].loaded:
            server = name


def backends() -> dict[str, Backend]:
    """Every backend by name, with its state."""
    return dict(_backends)
