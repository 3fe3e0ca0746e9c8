"""``leanops info``: versions, devices, which backend serves each operator, and why each absent backend is absent."""

from __future__ import annotations

from typing import Any

import torch

from leanops import _native, _registry
from leanops.autotune import fingerprint

_OPTIONAL = ("triton", "cupy", "cupy-cuda13x", "rich", "safetensors", "transformers", "accelerate", "peft")


def serving(spec: _registry.OpSpec, device_type: str) -> str:
    """The backend that serves a call with tensors on such a device."""
    if spec.composite is not None:
        return "composite of leanops operators"
    key = device_type.upper()
    if backend := _native.server(spec.name, key):
        return f"{backend.name} ({backend.detail})" if backend.name in ("cpu", "cuda") else backend.name
    return f"{device_type} (registered from Python)" if _native.has_kernel(spec.name, key) else "reference"


def gpus() -> list[dict[str, object]]:
    if not torch.cuda.is_available():
        return []
    return [fingerprint.gpu(torch.device("cuda", i)) for i in range(torch.cuda.device_count())]


def collect() -> dict[str, Any]:
    """Everything that ``leanops info`` shows, in types that JSON has."""
    devices = gpus()
    device_types = ["cpu", *(["cuda"] if devices else [])]
    return {
        "leanops": _native.version(),
        "software": fingerprint.software()
        | {name: v for name in _OPTIONAL if (v := fingerprint.package_version(name)) is not None},
        "cpu": fingerprint.cpu(),
        "gpus": devices,
        "backends": {name: _backend_entry(backend, bool(devices)) for name, backend in _native.backends().items()},
        "build": _native.build_report(),
        "operators": {spec.name: {t: serving(spec, t) for t in device_types} for spec in _registry.specs()},
    }


def _backend_entry(backend: _native.Backend, has_gpu: bool) -> dict[str, object]:
    """A backend in the report. The state of a CUDA library without a GPU is ``compiled in``."""
    state, detail = backend.state, backend.detail
    built = _native.build_report().get("cuda", {}).get("built", False)
    if backend.name == "cuda" and built and not has_gpu and "cuda" not in _native.disabled():
        state, detail = "compiled in", _why_no_cuda()
    return {"loaded": backend.loaded, "state": state, "detail": detail}


def lines(info: dict[str, Any]) -> list[str]:
    """The report as plain text."""
    out = [f"leanops {info['leanops']}"]
    out += [f"  {name:<12} {version or 'absent'}" for name, version in info["software"].items()]
    cpu = info["cpu"]
    sizes = ", ".join(f"{level} {_size(size)}" for level, size in cpu["caches"].items())
    out += [
        "",
        "devices",
        f"  cpu          {cpu['name']}, {cpu['cores']} cores, threads of torch: {cpu['threads']}",
    ]
    out += [f"               {' '.join(cpu['isa']) or 'no instruction set named'}" + (f"; {sizes}" if sizes else "")]
    for i, gpu in enumerate(info["gpus"]):
        out.append(
            f"  cuda:{i}       {gpu['name']}, sm {gpu['sm']}, {gpu['multiprocessors']} SM, "
            f"{_size(gpu['memory'])}, driver {gpu['driver'] or 'unknown'}"
        )
    if not info["gpus"]:
        out.append("  cuda         none: " + _why_no_cuda())
    out += ["", "backends"]
    for name, backend in info["backends"].items():
        out.append(f"  {name:<12} {backend['state']}: {backend['detail']}")
    out += ["", "operators"]
    for name, by_device in info["operators"].items():
        out.append(f"  {name:<14} " + "; ".join(f"{device}: {backend}" for device, backend in by_device.items()))
    return out


def _why_no_cuda() -> str:
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA"
    return "torch sees no CUDA device"


def _size(n: int) -> str:
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if n >= scale:
            return f"{n / scale:g} {unit}" if n % scale == 0 else f"{n / scale:.1f} {unit}"
    return f"{n} B"
