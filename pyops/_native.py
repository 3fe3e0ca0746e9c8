"""Finds and loads the compiled libraries, and keeps the reason for the absence of each backend."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from leanops import _registry

FOLDER = Path(__file__).parent / "lib"
NAMES = ("cpu", "cuda", "triton", "nvrtc")  # on CUDA in the order of preference
BY_DEVICE = {"CPU": ("cpu",), "CUDA": ("cuda", "triton", "nvrtc")}


@dataclass(frozen=True)
class Backend:
    """A backend and its state."""

    name: str
    state: str  # "in use"; "available", where preferred backends serve every operator that it could; or "absent"
    detail: str  # what it serves, or why it serves nothing

    @property
    def loaded(self) -> bool:
        return self.state == "in use"


_backends: dict[str, Backend] = {}
_servers: dict[tuple[str, str], str] = {}  # (operator, dispatch key) -> name of the backend that serves it


def version() -> str:
    return importlib.metadata.version("leanops")


@cache
def build_report() -> dict[str, dict[str, Any]]:
    """The build's report about each library; empty without a report."""
    try:
        report: dict[str, dict[str, Any]] = json.loads((FOLDER / "build.json").read_text())
    except FileNotFoundError:
        return {}
    return report


def disabled() -> frozenset[str]:
    """The backends that LEANOPS_DISABLE names, separated by commas."""
    names = frozenset(filter(None, os.environ.get("LEANOPS_DISABLE", "").replace(" ", "").split(",")))
    if unknown := sorted(names.difference(NAMES)):
        raise ValueError(f"leanops: LEANOPS_DISABLE must name backends of {', '.join(NAMES)}, got {', '.join(unknown)}")
    return names


def _absence_reason(library: str) -> str | None:
    """Why a native library cannot serve; None if it can."""
    if library in disabled():
        return "switched off by LEANOPS_DISABLE"
    if library == "cuda" and torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA"
    if not (FOLDER / f"libleanops_{library}.so").exists():
        return str(build_report().get(library, {}).get("reason", "the library is not in this installation"))
    return None


def _load_library(library: str) -> Backend:
    reason = _absence_reason(library)
    if reason is not None:
        return Backend(library, "absent", reason)
    path = FOLDER / f"libleanops_{library}.so"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return Backend(library, "absent", f"the library does not load: {error}")
    for spec in _registry.specs():
        if has_kernel(spec.name, library.upper()):
            _servers[spec.name, library.upper()] = library
            spec.native_on.add(library)
    if library == "cuda":
        archs = " ".join(f"sm_{arch}" for arch in build_report().get(library, {}).get("archs", ()))
        compiled = f"compiled for {archs}, " if archs else ""
        return Backend(library, "in use", f"{compiled}runs on CUDA {torch.version.cuda}")
    if problem := _ask_cpu_library("leanops_cpu_isa_error"):
        raise ValueError(f"leanops: {problem}")
    return Backend(library, "in use", cpu_isa())


def has_kernel(operator: str, key: str) -> bool:
    """Whether a kernel other than the reference serves an operator for a dispatch key."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{_registry.NAMESPACE}::{operator}", key)


def server(operator: str, key: str) -> Backend | None:
    """The backend that serves an operator for a dispatch key; None for the reference and for other code's kernels."""
    name = _servers.get((operator, key))
    return None if name is None else _backends[name]


def _ask_cpu_library(question: str) -> str:
    entry = getattr(ctypes.CDLL(str(FOLDER / "libleanops_cpu.so")), question)
    entry.restype = ctypes.c_char_p
    answer: bytes = entry()
    return answer.decode()


def cpu_isa() -> str:
    """The instruction set that the loaded CPU library chose: ``baseline``, ``avx2`` or ``avx512``."""
    return _ask_cpu_library("leanops_cpu_isa")


def _python_backend(name: str, package: str) -> Backend:
    """Register a backend's Python launchers for CUDA, each where no preferred backend serves the operator."""
    if name in disabled():
        return Backend(name, "absent", "switched off by LEANOPS_DISABLE")
    if importlib.util.find_spec(package) is None:
        return Backend(name, "absent", f"{package} is not installed")
    if torch.version.cuda is None:
        return Backend(name, "absent", f"this torch ({torch.__version__}) is built without CUDA")
    supported = [spec for spec in _registry.specs() if name in spec.backends]
    unserved = [spec for spec in supported if not has_kernel(spec.name, "CUDA")]
    for spec in unserved:
        _registry.implement(spec.name, "CUDA", _lazy(spec.backends[name]))
        _servers[spec.name, "CUDA"] = name
    if not unserved:
        preferred = dict.fromkeys(_servers.get((spec.name, "CUDA"), "Python") for spec in supported)
        return Backend(name, "available", f"not needed: {' and '.join(preferred)} has every CUDA operator")
    served = "the CUDA operators" if unserved == supported else ", ".join(spec.name for spec in unserved)
    return Backend(name, "in use", f"serves {served}")


def _lazy(loader: _registry.Loader) -> Callable[[Any], Any]:
    """A launcher whose module (and with it Triton or CuPy) is imported at the first call, not with leanops."""
    launcher = cache(loader)
    return lambda call: launcher()(call)


def _warn_at_first_use() -> None:
    """Prepare the warning for a device that only the reference serves, unless LEANOPS_DISABLE names its backends."""
    for key, names in BY_DEVICE.items():
        backends = [_backends[name] for name in names]
        if any(backend.state != "absent" for backend in backends) or disabled().intersection(names):
            continue
        if key == "CPU":
            reason = f"the CPU, because the compiled library is absent: {backends[0].detail}"
            remedy = "After that, install leanops again."
        else:
            absent = "; ".join(f"{backend.name}: {backend.detail}" for backend in backends)
            reason = f"the GPU, because its backends are absent: {absent}"
            package = "leanops[triton]" if torch.version.cuda else "a torch that is built with CUDA"
            remedy = f"The quickest remedy is to install {package}."
        _registry.unserved[getattr(torch._C.DispatchKey, key)] = (
            f"leanops: the pure torch reference, tens to hundreds of times slower than a kernel, serves {reason}. "
            f"{remedy} `leanops info` shows what serves each operator; LEANOPS_DISABLE={','.join(names)} silences this."
        )


def load() -> None:
    """Load every backend that can serve, once. On CUDA an operator's order of preference is native, Triton, NVRTC."""
    if _backends:
        return
    for library in ("cpu", "cuda"):
        _backends[library] = _load_library(library)
    for name, package in (("triton", "triton"), ("nvrtc", "cupy")):
        _backends[name] = _python_backend(name, package)
    _warn_at_first_use()


def backends() -> dict[str, Backend]:
    """Every backend by name, with its state."""
    return dict(_backends)
