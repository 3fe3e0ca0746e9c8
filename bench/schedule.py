"""In which order rows are measured, and which of them fit into the two minutes of ``--quick`` on any machine.

With one thread count first: the headline row of every operator in every dtype, each with its share of the time that is
left; then the other cases in rising cost; then the same with the other thread counts. What a row will cost is guessed
from its shapes and the machine's rates, and corrected by the rows that were measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from leanops.bench import roofline
from leanops.bench.measurement import LEAST_ROUNDS, by_reference, without_memory, work
from leanops.bench.plan import Group, Job
from leanops.bench.roofline import Roofline

QUICK_S = 100.0  # seconds after which --quick is done; starting and writing come on top
NOT_REACHED = "not reached within the two minutes of --quick"

_ELEMENT_S = 20e-9  # an eager peer's time for an element, on a core that adds in place at _USUAL
_REFERENCE_S = 500e-9
_USUAL = 10e9  # bytes a second
_CALLS = LEAST_ROUNDS + 5  # of operator and peer each: gate, calibration, rounds, noise, peak memory
_LEAST_S = 0.2  # what a row costs beyond its calls


@dataclass(frozen=True)
class Load:
    """What a call has to do."""

    bytes: int
    flops: int
    flops_dtype: str
    work: int  # elements times seeds


@dataclass
class Forecast:
    """Seconds that a row takes at least: the operator beside its main peer in as few rounds as count."""

    device: torch.device
    _loads: dict[tuple[Group, str], Load] = field(default_factory=dict)
    _ratios: dict[Group, float] = field(default_factory=dict)  # measured over guessed

    def load(self, job: Job) -> Load:
        key = job.group, job.name
        if key not in self._loads:
            args = without_memory(job, self.device)
            if args is None:
                self._loads[key] = Load(0, 0, "", 0)
            else:
                cost = job.spec.cost(*args)
                moved = max(cost.read + cost.written, roofline.tensor_bytes(args))
                dtype = str(cost.flops_dtype).removeprefix("torch.")
                self._loads[key] = Load(moved, cost.flops, dtype, work(job.spec, args))
        return self._loads[key]

    def seconds(self, job: Job, roof: Roofline) -> float:
        """Infinite for a case that the reference alone would have to serve at a size that it is too slow for."""
        load = self.load(job)
        referenced = by_reference(job, self.device)
        if referenced and load.work > job.subject.reference_limit:
            return math.inf
        return _LEAST_S + self._guess(load, roof, referenced) * self._correction(job.group)

    def learn(self, job: Job, roof: Roofline, least_s: float) -> None:
        """Correct what follows by what a row took at least."""
        guess = self._guess(self.load(job), roof, by_reference(job, self.device))
        if guess > 0:
            self._ratios[job.group] = max(least_s - _LEAST_S, 0.1 * guess) / guess

    def _correction(self, group: Group) -> float:
        if group in self._ratios:
            return self._ratios[group]
        logs = [math.log(ratio) for ratio in self._ratios.values()]
        return max(1.0, math.exp(sum(logs) / len(logs))) if logs else 1.0

    def _guess(self, load: Load, roof: Roofline, referenced: bool) -> float:
        slowness = max(1.0, _USUAL / roof.bandwidth[roofline.IN_PLACE])
        element_s = (_REFERENCE_S if referenced else _ELEMENT_S) if self.device.type == "cpu" else 0.0
        call_s = load.work * element_s * slowness + 3 * load.bytes / roof.bandwidth[roofline.COPY]
        if load.flops:
            call_s = 3 * load.bytes / roof.bandwidth[roofline.COPY]
            # a peer multiplies in the inputs' dtype, however slow torch is in it
            call_s += load.flops / roof.gemm.get(load.flops_dtype, _USUAL)
        return _CALLS * call_s


def headlines(jobs: Sequence[Job], substitutes: bool) -> dict[Group, list[Job]]:
    """For every operator and dtype the case to show, then cheaper ones in its place, the cheapest last."""
    groups: dict[Group, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.group, []).append(job)
    ladders = {}
    for group, members in groups.items():
        wanted = members[0].subject.headline
        named = sorted((job for job in members if job.name in wanted), key=lambda job: wanted.index(job.name))
        ladders[group] = named or members
        if substitutes:
            ladders[group] = [*ladders[group], members[0].small()]
    return ladders


def pick(ladder: Sequence[Job], seconds: Sequence[float], share_s: float) -> Job:
    """The first that fits into its share of the time; the cheapest where none does."""
    for job, needed in zip(ladder, seconds, strict=True):
        if needed <= share_s:
            return job
    return ladder[min(range(len(ladder)), key=lambda i: (seconds[i], -i))]
