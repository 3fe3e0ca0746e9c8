"""Reliable timing: interleaved candidates, one sample in each round, and the bootstrap interval of a ratio.

Absolute times drift with the machine; the ratio of two candidates timed next to each other does not. So candidates
take turns in rounds, each round gives every candidate one sample, and ratios are formed within rounds. Each round times
the first candidate a second time. The ratio of its two times is the noise floor of the run.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Interval:
    """An estimate with its bootstrap confidence interval."""

    value: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """Half the width of the interval, as a fraction of the estimate."""
        return (self.high - self.low) / (2 * self.value)


@dataclass
class Samples:
    """Seconds for each call, one list for each candidate. The k-th entries of all lists are from the same round."""

    seconds: dict[str, list[float]]
    inner: dict[str, int]  # calls timed together in one sample
    again: list[float] = field(default_factory=list)  # the first candidate's second sample of every round

    def noise_floor(self, confidence: float = 0.95) -> Interval:
        """The ratio of the first candidate to itself. The machine's noise moves it away from 1."""
        first = next(iter(self.seconds.values()))
        return paired_ratio(self.again, first, confidence=confidence)


def _resample(values: np.ndarray, confidence: float, resamples: int, seed: int) -> tuple[float, float]:
    generator = np.random.default_rng(seed)
    picks = generator.integers(0, len(values), (resamples, len(values)))
    medians = np.median(values[picks], axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(medians, (tail, 1 - tail))
    return float(low), float(high)


def _checked(name: str, samples: Sequence[float]) -> np.ndarray:
    values = np.asarray(samples, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.all(np.isfinite(values)) or not np.all(values > 0):
        raise ValueError(f"{name}: samples must be a list of positive times, got {list(samples)[:5]}")
    return values


def median(samples: Sequence[float], *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
    """The median time and its interval."""
    values = _checked("median", samples)
    return Interval(float(np.median(values)), *_resample(values, confidence, resamples, seed))


def paired_ratio(
    numerator: Sequence[float],
    denominator: Sequence[float],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """The median of the ratios within rounds: how many times longer the numerator takes.

    A disturbance of a round slows both of its samples and cancels.
    """
    a, b = _checked("paired_ratio", numerator), _checked("paired_ratio", denominator)
    if len(a) != len(b):
        raise ValueError(f"paired_ratio: both lists must have the same length, got {len(a)} and {len(b)}")
    logs = np.log(a / b)
    low, high = _resample(logs, confidence, resamples, seed)
    return Interval(math.exp(float(np.median(logs))), math.exp(low), math.exp(high))


def unpaired_ratio(
    numerator: Sequence[float],
    denominator: Sequence[float],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """The ratio of the medians of samples from two different runs, resampled independently."""
    a, b = _checked("unpaired_ratio", numerator), _checked("unpaired_ratio", denominator)
    generator = np.random.default_rng(seed)
    medians = [
        np.median(values[generator.integers(0, len(values), (resamples, len(values)))], axis=1) for values in (a, b)
    ]
    tail = (1 - confidence) / 2
    low, high = np.quantile(medians[0] / medians[1], (tail, 1 - tail))
    return Interval(float(np.median(a) / np.median(b)), float(low), float(high))


class Clock:
    """Seconds that ``inner`` calls of a function take on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            # read and written before each sample, so that no sample finds its inputs in L2
            self._flush = torch.empty(4 * max(properties.L2_cache_size, 1 << 20), dtype=torch.int8, device=device)

    def __call__(self, call: Call, inner: int = 1) -> float:
        if self.device.type == "cuda":
            return self._cuda(call, inner)
        start = time.perf_counter_ns()
        for _ in range(inner):
            call()
        return max(time.perf_counter_ns() - start, 1) * 1e-9

    def _cuda(self, call: Call, inner: int) -> float:
        with torch.cuda.device(self.device):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.add_(1)
            begin.record()
            for _ in range(inner):
                call()
            end.record()
            end.synchronize()
        return max(begin.elapsed_time(end), 1e-6) * 1e-3

    def now(self) -> float:
        """Seconds since a fixed moment, for time budgets."""
        return time.perf_counter()

    def settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def rotating(calls: Sequence[Call]) -> Call:
    """One call that runs the others in turn: the same work on more copies of its inputs than a cache holds."""
    if len(calls) == 1:
        return calls[0]
    turn = 0

    def call() -> object:
        nonlocal turn
        turn = (turn + 1) % len(calls)
        return calls[turn]()

    return call


def calibrate(clock: Clock, call: Call, *, sample_s: float = 2e-3, limit: int = 1 << 16) -> tuple[int, float]:
    """The number of calls in a sample of at least ``sample_s`` seconds, and the seconds of one call. Warms up."""
    seconds, inner = clock(call), 1  # the first call is cold
    clock.settle()
    if seconds < 20 * sample_s:
        seconds = clock(call)
    while seconds < sample_s and inner < limit:
        inner = min(limit, max(2 * inner, math.ceil(1.1 * inner * sample_s / seconds)))
        seconds = clock(call, inner)
    return inner, seconds / inner


def interleave(
    calls: Mapping[str, Call],
    *,
    device: torch.device | str = "cpu",
    budget_s: float = 2.0,
    rounds: tuple[int, int] = (5, 100),
    sample_s: float = 2e-3,
    order: str = "abba",
    seed: int = 0,
    clock: Clock | None = None,
    inner: Mapping[str, int] | None = None,
) -> Samples:
    """Time all calls in turns until the time budget is spent: at least ``rounds[0]`` rounds, at most ``rounds[1]``.

    ``order`` is ``"abba"`` (each round reverses the one before, so that linear drift cancels) or ``"random"``.
    ``inner`` has the number of calls in a sample, if :func:`calibrate` has found it before.
    """
    if not calls:
        raise ValueError("interleave: calls must not be empty")
    if order not in ("abba", "random"):
        raise ValueError(f"interleave: order must be abba or random, got {order}")
    clock = clock or Clock(torch.device(device))
    inner = dict(inner or {name: calibrate(clock, call, sample_s=sample_s)[0] for name, call in calls.items()})
    first = next(iter(calls))
    # the first candidate's two turns stand at the two ends of a round, as far apart as possible
    turns = [(name, name) for name in calls] + [("", first)]
    samples = Samples({name: [] for name in calls}, inner)
    shuffle = random.Random(seed).shuffle
    started = clock.now()
    for done in range(rounds[1]):
        if done >= rounds[0] and (clock.now() - started) * (done + 1) / max(done, 1) > budget_s:
            break
        for label, name in turns:
            seconds = clock(calls[name], inner[name]) / inner[name]
            (samples.seconds[label] if label else samples.again).append(seconds)
        if order == "abba":
            turns.reverse()
        else:
            shuffle(turns)
    return samples
