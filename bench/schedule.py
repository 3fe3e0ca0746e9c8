"""In which order rows are measured, and which of them fit into the two minutes of ``--quick`` on any machine.

With one thread count first: the headline row of every operator in every dtype, each with its share of the time that is
left; then the other cases in rising cost; then the same with the other thread counts. The seconds of a row are guessed
from its shapes and the machine's rates, and the guess is corrected by the rows that were measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from leanops.bench import roofline
from leanops.bench.measurement import LEAST_ROUNDS, by_reference, without_memory, work
from leanops.bench.plan import Group, Job
from leanops.bench.roofline import Roofline

QUICK_S = 100.0  # seconds that --quick measures; starting Python and writing files come on top
NOT_REACHED = "not reached within the two minutes of --quick"

_USUAL = 10e9  # bytes a second of an in-place add at which the next two times hold; also flops a second of a product
_ELEMENT_S = 20e-9  # an eager peer's seconds for an element
_REFERENCE_S = 500e-9  # the reference's seconds for an element
_PEER_CALLS = LEAST_ROUNDS + 2  # gate, calibration, rounds
_OWN_CALLS = 2 * LEAST_ROUNDS + 4  # the same with two turns a round, inputs, peak memory
_LEAST_S = 0.2  # seconds that a row takes beyond its calls
_PRIOR_S = 3.0  # weight of the guess: it counts as so many seconds of rows that were guessed right


@dataclass(frozen=True)
class Load:
    """The work of a call."""

    bytes: int
    flops: int
    flops_dtype: str
    work: int  # elements times seeds


@dataclass
class Forecast:
    """Seconds that a row takes at least: the operator beside its main peer in as few rounds as count."""

    device: torch.device
    _loads: dict[tuple[Group, str], Load] = field(default_factory=dict)
    _rows: list[tuple[Group, float, float]] = field(default_factory=list)  # seconds measured and guessed

    def load(self, job: Job) -> Load:
        key = job.group, job.name
        if key not in self._loads:
            args = without_memory(job, self.device)
            if args is None:
                self._loads[key] = Load(0, 0, "", 0)
            else:
                cost = job.spec.cost(job.spec.bind(*args))
                moved = max(cost.read + cost.written, roofline.tensor_bytes(args))
                dtype = str(cost.flops_dtype).removeprefix("torch.")
                self._loads[key] = Load(moved, cost.flops, dtype, work(job.spec, args))
        return self._loads[key]

    def seconds(self, job: Job, roof: Roofline) -> float:
        """Infinite where only the reference serves a case that is too large for it."""
        load = self.load(job)
        referenced = by_reference(job, self.device)
        if referenced and load.work > job.subject.reference_limit:
            return math.inf
        return _LEAST_S + self._guess(load, roof, referenced) * self._correction(job.group)

    def learn(self, job: Job, roof: Roofline, least_s: float) -> None:
        """Correct the later guesses by the least time that a row took."""
        guess = self._guess(self.load(job), roof, by_reference(job, self.device))
        self._rows.append((job.group, max(least_s - _LEAST_S, 0.0), guess))

    def _correction(self, group: Group) -> float:
        """Measured over guessed seconds of the group's rows, else of all rows; few seconds change it little."""
        rows = [row for row in self._rows if row[0] == group] or self._rows
        return (_PRIOR_S + sum(row[1] for row in rows)) / (_PRIOR_S + sum(row[2] for row in rows))

    def _guess(self, load: Load, roof: Roofline, referenced: bool) -> float:
        slowness = max(1.0, _USUAL / roof.bandwidth[roofline.IN_PLACE])
        move_s = 3 * load.bytes / roof.bandwidth[roofline.COPY]
        if referenced:
            return _OWN_CALLS * (move_s + load.work * _REFERENCE_S * slowness)
        if load.flops:  # a peer multiplies in the inputs' dtype, however slow torch is in it
            peer_s = load.flops / roof.gemm.get(load.flops_dtype, _USUAL)
            own_s = move_s + 2 * load.flops / max(roof.gemm.values(), default=_USUAL)
        else:
            peer_s = load.work * _ELEMENT_S * slowness if self.device.type == "cpu" else move_s
            own_s = move_s
        return _OWN_CALLS * own_s + _PEER_CALLS * peer_s


def headlines(jobs: Sequence[Job], substitutes: bool) -> dict[Group, list[Job]]:
    """For every operator and dtype the case to show, then its substitutes, the cheapest last."""
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


def choose(ladders: Mapping[Group, Sequence[Job]], seconds: Callable[[Job], float], left_s: float) -> dict[Group, Job]:
    """A job of each ladder, the first where time allows.

    While the chosen jobs take longer than ``left_s`` together, the dearest that has a cheaper job behind it in its
    ladder is replaced by that job.
    """
    chosen = {group: ladder[0] for group, ladder in ladders.items()}
    while sum(map(seconds, chosen.values())) > left_s:
        cheaper = {
            group: job
            for group, ladder in ladders.items()
            for job in reversed(ladder)
            if ladder.index(job) > ladder.index(chosen[group]) and seconds(job) < seconds(chosen[group])
        }
        if not cheaper:
            break
        group = max(cheaper, key=lambda group: seconds(chosen[group]))
        chosen[group] = cheaper[group]
    return chosen
