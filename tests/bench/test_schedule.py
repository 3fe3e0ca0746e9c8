"""``--quick`` shows a row of every operator in every dtype in two minutes, on machines that this one is not.

A machine is simulated by its clock, which counts the seconds that the bytes, operations and elements of a call take
there, and what else a row needs: its inputs, the gate, the import of a peer. Only small inputs are computed.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch._guards import active_fake_mode

from leanops import info
from leanops.autotune import fingerprint
from leanops.autotune.measure import Clock
from leanops.bench import accuracy, memory, plan, report, roofline, runner, schedule
from leanops.bench.measurement import Measurement
from leanops.bench.peers import Subject
from leanops.bench.plan import Settings
from leanops.bench.results import Gate, OperatorResults
from leanops.bench.schedule import Forecast
from leanops.bench.text import NO_TIME

PROMISE_S = 120.0
START_S = 12.0  # Python and torch start, files are written


@dataclass
class Machine(Clock):
    """The seconds that work costs on a machine."""

    bandwidth: float = 3e9
    gemm: dict[str, float] = field(default_factory=lambda: {"float32": 20e9, "bfloat16": 1e9})
    own: float = 8e-9  # an operator's element
    eager: float = 60e-9  # an eager peer's element
    reference: float = 0.0  # an element where the reference alone serves
    draw: float = 20e-9  # an element of the inputs
    package: float = 10.0  # the import of a package of peers
    roofline: float = 6.0
    time: float = 0.0
    job: plan.Job | None = None
    seen: set[str] = field(default_factory=set)
    forecast: Forecast = field(default_factory=lambda: Forecast(torch.device("cpu")))

    def now(self):
        return self.time

    def settle(self):
        pass

    def __call__(self, call, inner=1):
        seconds = inner * self.cost(call.name)
        self.time += seconds
        return seconds

    def cost(self, name):
        load = self.forecast.load(self.job)
        if name == self.job.spec.name:
            product = 2 * load.flops / self.gemm["float32"]
            return 1e-5 + load.bytes / self.bandwidth + product + load.work * (self.reference or self.own)
        if name.startswith("pytorch_optimizer") and name not in self.seen:
            self.seen.add(name)
            self.time += self.package
        if load.flops:
            dtype = str(self.job.dtype).removeprefix("torch.")
            return load.flops / self.gemm[dtype]
        return load.work * self.eager


def simulate(patch, machine, **options):
    """``leanops bench --quick`` on a machine: its results, and the rows in the order in which they were measured."""
    taken = []
    take_really, cases_really, small_really = Measurement.take, Subject.bench_cases, Subject.small_case

    def simulated(case, small):
        def make(device, dtype, generator):
            if active_fake_mode() is not None:  # asked for shapes alone
                return case.make(device, dtype, generator)
            machine.time += machine.draw * machine.forecast.load(machine.job).work
            return small.make(device, dtype, generator)

        return replace(case, make=make)

    def cases(subject, spec):
        small = small_really(subject, spec)
        return {name: simulated(case, small) for name, case in cases_really(subject, spec).items()}

    def small_case(subject, spec):
        return simulated(small_really(subject, spec), small_really(subject, spec))

    def take(measurement, limit_s=None):
        machine.job, started = measurement.job, machine.time
        take_really(measurement, limit_s)
        taken.append((measurement.job, machine.time - started))

    def check(spec, subject, args, dtype, peers):
        machine.time += 0.1 + machine.cost(spec.name)
        machine.time += sum(machine.cost(peer.label) for peer in peers if peer.same_result)
        return Gate(True, 0.0, 0.0, "reference"), {}

    def rooflines(device, threads, dtypes, effort, clock):
        machine.time += machine.roofline
        patterns = (roofline.FILL, roofline.IN_PLACE, roofline.COPY, roofline.READ, roofline.TRIAD)
        return roofline.Roofline("cpu", threads, dict.fromkeys(patterns, machine.bandwidth), machine.gemm, 1e-5)

    def peak(call, device):
        machine.time += machine.cost(machine.job.spec.name)
        return 0

    patch.setattr(Measurement, "take", take)
    patch.setattr(Measurement, "_dispatch", lambda _: 1e-5)
    patch.setattr(fingerprint, "memory_available", lambda _: 1 << 40)
    patch.setattr(Measurement, "_copies", lambda _, args: [args])
    patch.setattr(Subject, "bench_cases", cases)
    patch.setattr(Subject, "small_case", small_case)
    patch.setattr(accuracy, "check", check)
    patch.setattr(memory, "peak_bytes", peak)
    patch.setattr(roofline, "measure", rooflines)
    if machine.reference:
        patch.setattr(info, "serving", lambda *_: "reference")
    settings = Settings(quick=True, threads=(1, 2), **options)
    count = Count()
    results = runner.run(plan.plan(settings), settings, count, clock=machine)
    assert count.done <= count.total
    return results, taken


class Count:
    """Progress that is only counted."""

    total = done = 0

    def start(self, total):
        self.total = total

    def step(self, text):
        self.done += 1

    def skip(self, count):
        self.done += count


MACHINES = {
    "fast": Machine(bandwidth=60e9, gemm={"float32": 300e9, "bfloat16": 2e12}, own=1e-9, eager=10e-9, draw=5e-9,
                    package=1.0, roofline=2.0),
    "two slow cores, AVX2 alone, 1 GFLOP/s in bf16": Machine(),
    "slower by another factor of five": Machine(
        bandwidth=1e9, gemm={"float32": 4e9, "bfloat16": 0.1e9}, own=40e-9, eager=300e-9, draw=100e-9, roofline=10.0
    ),
    "no compiler: the reference alone": Machine(reference=1e-6),
}  # fmt: skip
SLOW, SLOWER = (name for name in MACHINES if "slow" in name)


@dataclass
class Run:
    name: str
    machine: Machine
    results: OperatorResults
    taken: list[tuple[plan.Job, float]]


@pytest.fixture(scope="module", params=MACHINES)
def run(request):
    """One run on each machine; the tests below look at it."""
    machine = MACHINES[request.param]
    with pytest.MonkeyPatch.context() as patch:
        return Run(request.param, machine, *simulate(patch, machine))


def test_every_operator_has_a_row_beside_its_main_peer_in_every_dtype_within_two_minutes(run):
    assert run.machine.time < PROMISE_S - START_S
    wanted = {(job.spec.name, str(job.dtype)) for job in plan.plan(Settings(quick=True))}
    rows = run.results.rows
    shown = {(row.op, f"torch.{row.dtype}") for row in rows if any(peer.available for peer in row.peers)}
    assert len(wanted) >= 10
    assert shown == wanted
    assert all(len(row.samples_s) >= schedule.LEAST_ROUNDS for row in rows if row.status == "ok")


def test_the_row_is_the_headline(run):
    if run.name not in ("fast", SLOW):
        return  # smaller cases stand in its place, as the test above holds
    rows = {row.key: row for row in run.results.rows}
    for job in plan.plan(Settings(quick=True, threads=(1,))):
        if job.name == job.subject.headline[0]:
            row = rows[job.row(torch.device("cpu")).key]
            assert row.status == "ok", row
            assert any(peer.ratio is not None for peer in row.peers)


def test_headlines_come_first_then_the_rest_in_rising_cost_and_thread_variants_last(run):
    threads = [job.threads for job, _ in run.taken]
    assert threads == sorted(threads)
    groups = [job.group for job, _ in run.taken]
    first = len(dict.fromkeys(groups))
    assert len(set(groups[:first])) == first
    for count in (1, 2):
        seconds = [s for job, s in run.taken[first:] if job.threads == count and s > 0]
        assert all(later > 0.3 * earlier for earlier, later in itertools.pairwise(seconds))


def test_what_has_no_row_is_one_line_at_the_end(run):
    lines = [line.text for line in report.operator_lines(run.results, None)]
    skipped = [row for row in run.results.rows if row.status == "skipped"]
    peers = [peer for row in run.results.rows for peer in row.peers if peer.reason == NO_TIME]
    assert sum(line.startswith("skipped: ") for line in lines) == (1 if skipped or peers else 0)
    assert sum("not reached within the two minutes of --quick" in line for line in lines) <= 1
    assert not any(line.split()[3:4] == ["skipped"] for line in lines)
    if run.name == "fast":
        assert not [row for row in skipped if row.threads == 1]
        assert len(skipped) < 0.2 * len(run.results.rows)
        assert len(peers) < 10
        assert run.results.drift == 0.0
    if run.name == SLOWER:
        assert len(skipped) > 5


def test_a_case_that_was_asked_for_has_no_substitute(monkeypatch):
    machine = replace(MACHINES[SLOWER], time=0.0, seen=set(), forecast=Forecast(torch.device("cpu")))
    results, taken = simulate(monkeypatch, machine, case="gaussian-16M", ops=("zo_noise_",))
    assert {job.name for job, _ in taken} == {"gaussian-16M"}
    assert {row.case for row in results.rows} == {"gaussian-16M"}


def test_the_dearest_rows_are_the_first_to_be_replaced():
    seconds = {"a": 10.0, "a small": 1.0, "b": 20.0, "b less": 8.0, "b small": 1.0, "c": 3.0}
    ladders = {"A": ["a", "a small"], "B": ["b", "b less", "b small"], "C": ["c"]}
    for left, names in ((40, "a,b,c"), (30, "a,b less,c"), (20, "a small,b less,c"), (1, "a small,b small,c")):
        assert list(schedule.choose(ladders, seconds.__getitem__, left).values()) == names.split(",")
