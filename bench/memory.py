"""The most memory that a call takes beyond its inputs."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

HOW = {
    "cpu": "peak resident set of the process over its value before the call (VmHWM, reset)",
    "cuda": "torch.cuda.max_memory_allocated over its value before the call",
}


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise OSError(f"/proc/self/status has no {field}")


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes above what was in use before; None where the system does not let the high-water mark be reset.

    On the CPU every page that the process touches counts, also those that torch did not allocate.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that malloc keeps would hide what the call takes
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        call()
        return max(_status("VmHWM") - before, 0)
    except (OSError, AttributeError):
        return None
