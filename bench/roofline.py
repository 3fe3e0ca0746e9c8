"""What the machine can do, measured before anything else, and what that allows an operator."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from leanops._registry import Cost
from leanops.autotune import fingerprint
from leanops.autotune.measure import Clock, calibrate
from leanops.common.dtypes import dtype_name

# the ways in which bytes move, each with a bandwidth of its own that bounds an operator
FILL, IN_PLACE, COPY, READ, TRIAD = "fill", "in-place add", "copy", "read", "triad"
_SHORT = ("bfloat16", "float16")
_SAMPLE_S = 5e-3


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
        ways = self.products(dtype)
        if not ways:
            return Floor(memory, f"memory ({pattern}); no {dtype} GEMM rate")
        way, rate = max(ways.items(), key=lambda item: item[1])
        arithmetic = cost.flops / rate
        return Floor(memory, f"memory ({pattern})") if memory > arithmetic else Floor(arithmetic, way)

    def products(self, dtype: str) -> dict[str, float]:
        """The ways to a product of matrices of ``dtype``, with their rates.

        A 16-bit product may be slower than the same one of the inputs widened to fp32: torch has no fast one for a
        processor without such instructions.
        """
        ways = {f"GEMM {dtype}": dtype}
        if dtype in _SHORT:
            ways[f"GEMM float32 of widened {dtype}"] = "float32"
        return {way: self.gemm[name] for way, name in ways.items() if name in self.gemm}

    def best(self, other: Roofline) -> Roofline:
        """The better of two measurements, rate by rate: a rate that another process slowed is no ceiling."""

        def better(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
            return {name: max(a[name], b[name]) for name in a}

        bandwidth, gemm = better(self.bandwidth, other.bandwidth), better(self.gemm, other.gemm)
        return Roofline(self.device, self.threads, bandwidth, gemm, min(self.dispatch_s, other.dispatch_s))

    def drift(self, other: Roofline) -> float:
        """By how much the bandwidths of two measurements differ, as a fraction: |geometric mean of ratios - 1|."""
        logs = [math.log(rate / self.bandwidth[name]) for name, rate in other.bandwidth.items()]
        return math.expm1(abs(sum(logs) / len(logs)))


def tensor_bytes(values: Any) -> int:
    """Bytes of all tensors in nested lists and tuples."""
    if isinstance(values, Tensor):
        return values.numel() * values.element_size()
    return sum(map(tensor_bytes, values)) if isinstance(values, (list, tuple)) else 0


def pattern(cost: Cost, argument_bytes: int, mutates: bool) -> str:
    """The way in which the bytes of ``cost`` move."""
    if cost.read == 0:
        return FILL
    if cost.written < cost.read // 8:
        return READ
    return IN_PLACE if mutates and argument_bytes < cost.read + cost.written else COPY


@dataclass(frozen=True)
class Effort:
    """How long to measure: ``samples`` of each rate, fewer where they take more than ``limit_s``, and at least one."""

    samples: int = 7
    limit_s: float = 3.0
    caches: int = 4  # size of an array, in last-level caches

    @classmethod
    def of(cls, quick: bool) -> Effort:
        return cls(5, 0.5, 2) if quick else cls(11, 5.0, 4)


def _best(clock: Clock, call: Callable[[], object], effort: Effort) -> float:
    """The shortest of a few samples: a ceiling is what the machine reaches when nothing disturbs it."""
    started = clock.now()
    inner, best = calibrate(clock, call, sample_s=_SAMPLE_S)
    for _ in range(effort.samples):
        if clock.now() - started > effort.limit_s:
            break
        best = min(best, clock(call, inner) / inner)
    return best


def _filled(n: int, device: torch.device) -> Tensor:
    """Random fp32 values, a few drawn and repeated: drawing hundreds of millions takes longer than measuring them."""
    drawn = torch.rand(min(n, 1 << 16), device=device)
    return drawn.repeat(-(-n // drawn.numel()))[:n]


def _bandwidth(clock: Clock, device: torch.device, effort: Effort) -> dict[str, float]:
    n = max(effort.caches * fingerprint.last_level_cache(device), 64 << 20) // 4
    a, b, c = (_filled(n, device) for _ in range(3))
    size = 4 * n
    calls: dict[str, tuple[int, Callable[[], object]]] = {
        FILL: (size, lambda: a.fill_(0.5)),
        IN_PLACE: (2 * size, lambda: a.add_(1e-3)),
        COPY: (2 * size, lambda: a.copy_(b)),
        READ: (size, lambda: b.sum()),
        TRIAD: (3 * size, lambda: torch.add(b, c, alpha=0.5, out=a)),
    }
    return {name: moved / _best(clock, call, effort) for name, (moved, call) in calls.items()}


def _product(clock: Clock, device: torch.device, dtype: torch.dtype, effort: Effort) -> float:
    """Operations a second of the largest product that takes no longer than the effort allows."""
    sizes = (8192,) if device.type == "cuda" else (128, 256, 512, 1024)
    for n in sizes:
        # random data: zeros draw less power and run faster
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        call = partial(torch.mm, a, b, out=torch.empty_like(a))
        if n == sizes[-1] or 8 * min(clock(call), clock(call)) > effort.limit_s / 2:  # the first call may compile
            break
    return 2.0 * n**3 / _best(clock, call, effort)


def measure(
    device: torch.device,
    threads: int,
    dtypes: Sequence[torch.dtype],
    effort: Effort = Effort(),
    clock: Clock | None = None,
) -> Roofline:
    """Measure the device with the thread count that torch has now."""
    clock = clock or Clock(device)
    one = torch.ones(1, device=device)
    wanted = list(dtypes)
    if any(dtype_name(dtype) in _SHORT for dtype in dtypes):
        wanted.append(torch.float32)  # the other way to a 16-bit product
    return Roofline(
        str(device),
        threads,
        _bandwidth(clock, device, effort),
        {dtype_name(dtype): _product(clock, device, dtype, effort) for dtype in dict.fromkeys(wanted)},
        _best(clock, lambda: one.add_(1.0), effort),
    )
