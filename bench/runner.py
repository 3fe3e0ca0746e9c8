"""Runs the benchmark: every case of every operator, gated, timed among its peers and set against the roofline."""

from __future__ import annotations

import gc
import inspect
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from leanops import _native
from leanops._registry import OpSpec
from leanops.autotune import fingerprint
from leanops.autotune.measure import Clock
from leanops.bench import memory, roofline
from leanops.bench.measurement import REFERENCE_ALONE, Dispatch, Measurement
from leanops.bench.plan import Job, Settings
from leanops.bench.progress import Progress
from leanops.bench.results import OperatorResults, Row, header
from leanops.bench.schedule import NOT_REACHED, QUICK_S, Forecast, choose, headlines
from leanops.bench.text import counted


def run(
    jobs: Sequence[Job],
    settings: Settings,
    progress: Progress,
    command: Sequence[str] = (),
    clock: Clock | None = None,
) -> OperatorResults:
    """Measure the jobs that :func:`leanops.bench.plan.plan` made of the settings, by the device's clock or another."""
    session = Session(jobs, settings, progress, clock)
    before = torch.get_num_threads()
    try:
        session.measure()
    finally:
        torch.set_num_threads(before)
    return session.results(command)


class Session:
    def __init__(self, jobs: Sequence[Job], settings: Settings, progress: Progress, clock: Clock | None = None) -> None:
        self.jobs, self.settings, self.progress = jobs, settings, progress
        self.device = torch.device(settings.device)
        self.clock = clock or Clock(self.device)
        self.effort = roofline.Effort.of(settings.quick)
        self.rooflines: dict[int, roofline.Roofline] = {}
        self.roofline_s = 0.0  # seconds of the last measurement of the machine
        self.drifts: list[float] = []
        self.measurements: list[Measurement] = []
        self.dispatch: Dispatch = {}
        self.forecast = Forecast(self.device)
        self.end = self.clock.now() + QUICK_S if settings.quick else math.inf

    @property
    def left(self) -> float:
        """Seconds left for rows: the machine is measured again at the end."""
        return self.end - self.clock.now() - self.roofline_s * len(self.rooflines)

    def measure(self) -> None:
        counts = list(dict.fromkeys(job.threads for job in self.jobs))
        self.progress.start(len(self.jobs) + 2 * len(counts))
        waiting = list(self.jobs)
        for threads in counts:
            if self.rooflines and self.left < 2 * self.roofline_s:
                break
            self._measure_machine(threads)
            jobs = [job for job in waiting if job.threads == threads]
            if self.settings.quick and len(self.rooflines) == 1:
                taken = self._headlines(jobs)
                jobs = [job for job in jobs if job not in taken]
            self._in_rising_cost(jobs)
            waiting = [job for job in waiting if job.threads != threads]
        self._skip(waiting)
        for threads in self.rooflines:
            self._measure_machine_again(threads)
        for measurement in self.measurements:
            if measurement.row.status == "ok":
                measurement.place(self.rooflines[measurement.job.threads])

    def _measure_machine(self, threads: int) -> None:
        self.progress.step(f"roofline, {counted(threads, 'thread')}")
        self.rooflines[threads] = self._roofline(threads)

    def _measure_machine_again(self, threads: int) -> None:
        """Measure the machine's drift during the run, and keep the better of the two measurements as the ceiling."""
        if self.end - self.clock.now() < self.roofline_s:
            self.progress.skip(1)
            return
        self.progress.step(f"roofline again, {counted(threads, 'thread')}")
        first, again = self.rooflines[threads], self._roofline(threads)
        self.drifts.append(first.drift(again))
        self.rooflines[threads] = first.best(again)

    def _roofline(self, threads: int) -> roofline.Roofline:
        torch.set_num_threads(threads)
        started = self.clock.now()
        dtypes = list(dict.fromkeys(job.dtype for job in self.jobs))
        found = roofline.measure(self.device, threads, dtypes, self.effort, self.clock)
        self.roofline_s = self.clock.now() - started
        return found

    def _headlines(self, jobs: Iterable[Job]) -> list[Job]:
        """Measure a row for every operator in every dtype, on any machine. Returns the jobs that were taken."""
        ladders = headlines(list(jobs), substitutes=not self.settings.case)
        taken: list[Job] = []
        while ladders:
            chosen = choose(ladders, self._seconds, self.left)
            group, job = min(chosen.items(), key=lambda item: self._seconds(item[1]))
            spare = max(self.left - sum(map(self._seconds, chosen.values())), 0.0) / len(chosen)
            ladder = ladders.pop(group)
            for candidate in ladder[ladder.index(job) :]:
                taken.append(candidate)
                if self._take(candidate, self._seconds(candidate) + spare).status != "skipped":
                    break
        return taken

    def _in_rising_cost(self, jobs: Iterable[Job]) -> None:
        waiting = list(jobs)
        while waiting:
            job = min(waiting, key=self._seconds)
            needed = self._seconds(job)
            if needed > self.left:
                for job in waiting:
                    self._skip([job], REFERENCE_ALONE if self._seconds(job) == math.inf else NOT_REACHED)
                return
            self._take(job, max(needed, self.left / 2) if self.settings.quick else None)
            waiting.remove(job)

    def _seconds(self, job: Job) -> float:
        return self.forecast.seconds(job, self.rooflines[job.threads])

    def _take(self, job: Job, limit_s: float | None) -> Row:
        measurement = Measurement(job, self.settings, self.device, self.dispatch, self.clock)
        self.measurements.append(measurement)
        if job not in self.jobs:
            self.progress.skip(-1)  # progress counts the planned case that this small one replaces
        self.progress.step(measurement.row.key)
        measurement.take(limit_s)
        if measurement.least_s is not None:
            self.forecast.learn(job, self.rooflines[job.threads], measurement.least_s)
        gc.collect()
        return measurement.row

    def _skip(self, jobs: Sequence[Job], reason: str = NOT_REACHED) -> None:
        for job in jobs:
            measurement = Measurement(job, self.settings, self.device, self.dispatch, self.clock)
            measurement.skip(job.reason or reason)
            self.measurements.append(measurement)
        self.progress.skip(len(jobs))

    def rows(self) -> list[Row]:
        """The rows in the order of the plan. A small case is left out where its group has another result."""
        order = {job.row(self.device).key: i for i, job in enumerate(self.jobs)}
        operators = list(dict.fromkeys(job.spec.name for job in self.jobs))
        rows = [measurement.row for measurement in self.measurements]
        planned = {(row.op, row.dtype) for row in rows if row.key in order and row.status != "skipped"}
        kept = [row for row in rows if row.key in order or (row.op, row.dtype) not in planned]
        return sorted(kept, key=lambda row: (operators.index(row.op), order.get(row.key, len(order))))

    def results(self, command: Sequence[str]) -> OperatorResults:
        rows = self.rows()
        noises = sorted(row.noise for row in rows if row.noise is not None)
        return OperatorResults(
            **header(self.device, command, sources({job.spec.name: job.spec for job in self.jobs})),
            settings=asdict(self.settings),
            roofline=list(self.rooflines.values()),
            noise_floor=noises[min(len(noises) - 1, int(0.95 * len(noises)))] if noises else None,
            drift=max(self.drifts, default=None),
            peak_how=memory.HOW[self.device.type],
            rows=rows,
        )


def sources(specs: dict[str, OpSpec]) -> dict[str, str]:
    """A hash for each operator over its family's Python files and the compiled libraries."""
    libraries = list(_native.FOLDER.glob("*.so"))
    hashes = {}
    for name, spec in specs.items():
        family = Path(inspect.getfile(spec.reference)).parent
        hashes[name] = fingerprint.source_hash([*family.glob("*.py"), *libraries])
    return hashes
