"""What the machine can do, measured before anything else, and what that allows an operator."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from leanops._registry import Cost
from leanops.autotune import fingerprint
from leanops.autotune.measure import Clock, calibrate

# how the bytes of an operator move, and so which measured bandwidth bounds them
FILL, IN_PLACE, COPY, READ, TRIAD = "fill", "in-place add", "copy", "read", "triad"


@dataclass(frozen=True)
class Floor:
    """The shortest time that the measured machine allows, and the resource that sets it."""

    seconds: float
    bound: str


@dataclass
class Roofline:
    """Rates of one device at one thread count: bytes a second (read and written counted), flops a second."""

    device: str
    threads: int
    bandwidth: dict[str, float]
    gemm: dict[str, float]
    dispatch_s: float

    def floor(self, cost: Cost, pattern: str) -> Floor:
        memory = (cost.read + cost.written) / self.bandwidth[pattern]
        if not cost.flops:
            return Floor(memory, f"memory ({pattern})")
        dtype = str(cost.flops_dtype).removeprefix("torch.")
        if dtype not in self.gemm:
            return Floor(memory, f"memory ({pattern}); no {dtype} GEMM rate")
        arithmetic = cost.flops / self.gemm[dtype]
        return Floor(memory, f"memory ({pattern})") if memory > arithmetic else Floor(arithmetic, f"GEMM {dtype}")

    def best(self, other: Roofline) -> Roofline:
        """The better of two measurements, rate by rate: what a neighbour slowed down is no ceiling."""

        def better(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
            return {name: max(a[name], b[name]) for name in a}

        bandwidth, gemm = better(self.bandwidth, other.bandwidth), better(self.gemm, other.gemm)
        return Roofline(self.device, self.threads, bandwidth, gemm, min(self.dispatch_s, other.dispatch_s))

    def drift(self, other: Roofline) -> float:
        """By how much the bandwidths of two measurements differ, as a fraction: |geometric mean of ratios - 1|."""
        logs = [math.log(rate / self.bandwidth[name]) for name, rate in other.bandwidth.items()]
        return math.expm1(abs(sum(logs) / len(logs)))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def tensor_bytes(values: Any) -> int:
    """Bytes of all tensors in nested lists and tuples."""
    if isinstance(values, Tensor):
        return values.numel() * values.element_size()
    return sum(map(tensor_bytes, values)) if isinstance(values, (list, tuple)) else 0


def pattern(cost: Cost, held: int, mutates: bool) -> str:
    """How the least bytes move, where the arguments hold ``held`` bytes."""
    if cost.read == 0:
        return FILL
    if cost.written < cost.read // 8:
        return READ
    return IN_PLACE if mutates and held < cost.read + cost.written else COPY


def _best(clock: Clock, call: Callable[[], object], samples: int) -> float:
    """The shortest of a few samples: a ceiling is what the machine reaches when nothing disturbs it."""
    inner, first = calibrate(clock, call, sample_s=5e-3)
    return min(first, *(clock(call, inner) / inner for _ in range(samples)))


def _bandwidth(clock: Clock, device: torch.device, samples: int) -> dict[str, float]:
    n = max(4 * fingerprint.last_level_cache(device), 64 << 20) // 4  # four caches large, fp32
    a, b, c = (torch.rand(n, device=device) for _ in range(3))
    size = 4 * n
    calls: dict[str, tuple[int, Callable[[], object]]] = {
        FILL: (size, lambda: a.fill_(0.5)),
        IN_PLACE: (2 * size, lambda: a.add_(1e-3)),
        COPY: (2 * size, lambda: a.copy_(b)),
        READ: (size, lambda: b.sum()),
        TRIAD: (3 * size, lambda: torch.add(b, c, alpha=0.5, out=a)),
    }
    return {name: moved / _best(clock, call, samples) for name, (moved, call) in calls.items()}


def _gemm(clock: Clock, device: torch.device, dtypes: Sequence[torch.dtype], samples: int) -> dict[str, float]:
    n = 8192 if device.type == "cuda" else 1024
    rates = {}
    for dtype in dtypes:
        # random data: zeros draw less power and run faster
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        seconds = _best(clock, partial(torch.mm, a, b, out=torch.empty_like(a)), samples)
        rates[str(dtype).removeprefix("torch.")] = 2 * n**3 / seconds
    return rates


def measure(device: torch.device, threads: int, dtypes: Sequence[torch.dtype], *, samples: int = 7) -> Roofline:
    """Measure the device with the thread count that torch has now."""
    clock = Clock(device)
    one = torch.ones(1, device=device)
    return Roofline(
        str(device),
        threads,
        _bandwidth(clock, device, samples),
        _gemm(clock, device, dtypes, samples),
        _best(clock, lambda: one.add_(1.0), samples),
    )
