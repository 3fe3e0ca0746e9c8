"""Runs the benchmark: every case of every operator, gated, timed among its peers and set against the roofline."""

from __future__ import annotations

import datetime
import gc
import inspect
import itertools
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from leanops import _native, _registry, info
from leanops._registry import Case, OpSpec
from leanops.autotune import fingerprint
from leanops.autotune.measure import Clock, Interval, calibrate, interleave, median, paired_ratio, rotating
from leanops.bench import accuracy, memory, roofline
from leanops.bench.peers import Args, Peer, Subject, Unavailable, check_wanted, subjects, wanted

SCHEMA = "leanops-bench/1"
COPIES = 8  # of a small case's inputs at most, so that they do not all lie in the cache
QUICK_S = 95  # seconds after which --quick starts no further case


@dataclass(frozen=True)
class Settings:
    ops: tuple[str, ...] = ()  # all where empty
    device: str = "cpu"
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    threads: tuple[int, ...] = ()  # one and all where empty
    peers: tuple[str, ...] | None = None  # parts of names; none where empty, all where None
    case: str = ""  # a regular expression that the key must match somewhere
    quick: bool = False

    @property
    def budget_s(self) -> float:
        return 0.7 if self.quick else 4.0

    @property
    def rounds(self) -> tuple[int, int]:
        return (5, 30) if self.quick else (7, 100)

    @property
    def peer_limit_s(self) -> float:
        """A peer whose single call takes longer is left out."""
        return 0.6 if self.quick else 20.0


@dataclass
class PeerResult:
    name: str
    origin: str
    available: bool
    reason: str = ""
    samples_s: list[float] = field(default_factory=list)
    median_s: float | None = None
    ratio: float | None = None  # the peer's time over the operator's
    ratio_low: float | None = None
    ratio_high: float | None = None
    error: float | None = None


@dataclass
class Row:
    """One case's result. ``status`` is ``ok``, ``wrong`` (the gate failed; no times are kept) or ``skipped``."""

    key: str
    op: str
    case: str
    dtype: str
    device: str
    threads: int
    backend: str
    status: str = "ok"
    reason: str = ""
    samples_s: list[float] = field(default_factory=list)
    inner: int = 1
    median_s: float | None = None
    low_s: float | None = None
    high_s: float | None = None
    noise: float | None = None  # |ratio of the operator to itself - 1| in this row
    elements: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    flops: int = 0
    ns_per_element: float | None = None
    gb_per_s: float | None = None
    gflop_per_s: float | None = None
    floor_s: float | None = None
    percent_of_roofline: float | None = None
    bound: str = ""
    gate: dict[str, Any] | None = None
    peak_bytes: int | None = None
    dispatch_s: float | None = None
    peers: list[PeerResult] = field(default_factory=list)


class Progress(Protocol):
    def start(self, total: int) -> None: ...
    def step(self, text: str) -> None: ...


@dataclass(frozen=True)
class Job:
    spec: OpSpec
    subject: Subject
    case: Case | None  # None: it cannot run, for the reason given
    name: str
    dtype: torch.dtype
    threads: int
    reason: str = ""

    def row(self, device: torch.device) -> Row:
        dtype = str(self.dtype).removeprefix("torch.")
        key = f"{self.spec.name}/{self.name}/{dtype}/{device}/{self.threads}t"
        if device.type == "cuda":
            key = f"{self.spec.name}/{self.name}/{dtype}/{device}"
        served = info.serving(self.spec, device.type)
        if self.subject.called:
            served = f"{self.subject.called} on {served}"
        return Row(key, self.spec.name, self.name, dtype, str(device), self.threads, served)


def device_of(name: str) -> torch.device:
    """The device of this name, where there is one."""
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("bench: --device cuda, but torch sees no CUDA device")
    return device


def plan(settings: Settings) -> list[Job]:
    """Every job that the settings ask for."""
    known = subjects()
    if unknown := [op for op in settings.ops if op not in known]:
        raise ValueError(f"bench: no operator named {', '.join(unknown)}; there are {', '.join(known)}")
    device = device_of(settings.device)
    matches = re.compile(settings.case).search
    jobs = []
    for spec in _registry.specs():
        if spec.name not in known or (settings.ops and spec.name not in settings.ops):
            continue
        subject = known[spec.name]
        cases: dict[str, Case | None] = {c.name: c for c in (*spec.cases, *subject.cases()) if c.bench}
        absent = subject.unavailable_cases()
        for name, case in (cases | dict.fromkeys(absent)).items():
            if settings.quick and not subject.quick(name):
                continue
            for dtype_name in settings.dtypes:
                dtype = getattr(torch, dtype_name)
                if dtype not in spec.dtypes:
                    continue
                for threads in thread_counts(settings):
                    job = Job(spec, subject, case, name, dtype, threads, absent.get(name, ""))
                    if matches(job.row(device).key):
                        jobs.append(job)
    if not jobs:
        raise ValueError("bench: no case matches")
    check_wanted(settings.peers, (peer.label for job in jobs for peer in job.subject.peers))
    return jobs


def in_turns(jobs: Sequence[Job]) -> list[Job]:
    """The operators in turns, so that a run that ends early has something of each."""
    queues: dict[str, list[Job]] = {}
    for job in jobs:
        queues.setdefault(job.spec.name, []).append(job)
    return [job for turn in itertools.zip_longest(*queues.values()) for job in turn if job is not None]


def thread_counts(settings: Settings) -> tuple[int, ...]:
    if torch.device(settings.device).type != "cpu":
        return (torch.get_num_threads(),)
    return settings.threads or tuple(sorted({1, fingerprint.cores()}))


def run(settings: Settings, progress: Progress, command: Sequence[str] = ()) -> dict[str, Any]:
    """The whole benchmark, as the JSON file holds it."""
    jobs = plan(settings)
    device = torch.device(settings.device)
    dtypes = list(dict.fromkeys(job.dtype for job in jobs))
    counts = list(dict.fromkeys(job.threads for job in jobs))
    threads_before = torch.get_num_threads()
    progress.start(len(jobs) + 2 * len(counts))
    started = time.monotonic()
    rooflines: dict[int, roofline.Roofline] = {}
    taken, drifts = [], []
    samples = 5 if settings.quick else 11
    try:
        for threads in counts:
            torch.set_num_threads(threads)
            progress.step(f"roofline, {threads} threads")
            rooflines[threads] = roofline.measure(device, threads, dtypes, samples=samples)
        dispatch: dict[Any, float] = {}
        for job in in_turns(jobs):
            torch.set_num_threads(job.threads)
            measurement = Measurement(job, settings, device, dispatch)
            taken.append(measurement)
            progress.step(measurement.row.key)
            if settings.quick and time.monotonic() - started > QUICK_S:
                measurement.row.status = "skipped"
                measurement.row.reason = f"not reached within the {QUICK_S} s of --quick"
                continue
            measurement.take()
            gc.collect()
        for threads in counts:
            torch.set_num_threads(threads)
            progress.step(f"roofline again, {threads} threads")
            again = roofline.measure(device, threads, dtypes, samples=samples)
            drifts.append(rooflines[threads].drift(again))
            rooflines[threads] = rooflines[threads].best(again)
    finally:
        torch.set_num_threads(threads_before)
    for measurement in taken:
        measurement.place(rooflines[measurement.job.threads])
    by_key = {measurement.row.key: measurement.row for measurement in taken}
    rows = [by_key[job.row(device).key] for job in jobs]
    noises = sorted(row.noise for row in rows if row.noise is not None)
    return {
        "schema": SCHEMA,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "leanops": _native.version(),
        "command": list(command),
        "settings": asdict(settings),
        "fingerprint": fingerprint.fingerprint(device, sources({job.spec.name: job.spec for job in jobs})),
        "backends": {n: {"loaded": b.loaded, "detail": b.detail} for n, b in _native.backends().items()},
        "roofline": [r.as_dict() for r in rooflines.values()],
        "noise_floor": noises[min(len(noises) - 1, int(0.95 * len(noises)))] if noises else None,
        "drift": max(drifts),
        "peak_how": memory.HOW[device.type],
        "rows": [asdict(row) for row in rows],
    }


def sources(specs: dict[str, OpSpec]) -> dict[str, str]:
    """A hash for each operator over its family's Python files and the compiled libraries."""
    libraries = list(_native.FOLDER.glob("*.so"))
    hashes = {}
    for name, spec in specs.items():
        family = Path(inspect.getfile(spec.reference)).parent
        hashes[name] = fingerprint.source_hash([*family.glob("*.py"), *libraries])
    return hashes


class Measurement:
    """One row in the making."""

    def __init__(
        self,
        job: Job,
        settings: Settings,
        device: torch.device,
        dispatch: dict[Any, float],
    ) -> None:
        self.job, self.settings, self.device, self.row = job, settings, device, job.row(device)
        self.cost: _registry.Cost | None = None
        self.pattern = ""
        self.dispatch = dispatch  # already measured, by operator, dtype and thread count

    def take(self) -> None:
        try:
            self._measure()
        except Unavailable as reason:
            self.row.status, self.row.reason = "skipped", str(reason)

    def _inputs(self) -> Args:
        if self.job.case is None:
            raise Unavailable(self.job.reason)
        return self.job.case.make(self.device, self.job.dtype, torch.Generator().manual_seed(0))

    def _measure(self) -> None:
        row, spec = self.row, self.job.spec
        needed, available = self._needed()
        if needed > available:
            raise Unavailable(f"needs about {needed / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are available")
        args = self._inputs()
        if info.serving(spec, self.device.type) == "reference" and _work(spec, args) > self.job.subject.reference_limit:
            raise Unavailable(
                "only the reference serves this operator here (see `leanops info`); too slow at this size"
            )
        gate, peer_errors = accuracy.check(spec, self.job.subject, args, self.job.dtype)
        row.gate = asdict(gate)
        if not gate.passed:
            row.status, row.reason = "wrong", gate.reason
            return
        self._time(args, peer_errors)
        row.peak_bytes = memory.peak_bytes(lambda: spec.op(*args), self.device)
        row.dispatch_s = self._dispatch()

    def _needed(self) -> tuple[int, int]:
        """Bytes of the inputs and of what peers need, from shapes alone, and the bytes at hand."""
        if self.job.case is None:
            raise Unavailable(self.job.reason)
        available = fingerprint.memory_available(self.device)
        args = _meta(self.job, self.device)
        if args is None:
            return 0, available
        # a stored direction and a temporary as large as the inputs, and what the maker itself takes
        return 3 * roofline.tensor_bytes(args) + (1 << 30), available

    def _copies(self, args: Args) -> list[Args]:
        held = max(roofline.tensor_bytes(args), 1)
        wanted = math.ceil(2 * fingerprint.last_level_cache(self.device) / held)
        return [args, *(self._inputs() for _ in range(min(COPIES, wanted) - 1))]

    def _time(self, args: Args, peer_errors: dict[str, float]) -> None:
        row, spec = self.row, self.job.spec
        copies = self._copies(args)
        clock = Clock(self.device)
        calls = {spec.name: rotating([_call(self.job, a) for a in copies])}
        times = {spec.name: 1}
        for peer in self._peers():
            result = PeerResult(peer.label, peer.origin, True, error=peer_errors.get(peer.name))
            try:
                call = rotating([peer.make(a) for a in copies])
                seconds = clock(call)
                if seconds > self.settings.peer_limit_s:
                    raise Unavailable(f"one call takes {seconds:.1f} s, over {self.settings.peer_limit_s:g} s")
            except Exception as error:  # whatever another package raises, the run goes on
                result.available, result.reason = False, (str(error).strip() or repr(error)).split("\n")[0]
                if result.reason.endswith(" only"):  # a peer for the other distribution says nothing here
                    continue
            else:
                calls[peer.label], times[peer.label] = call, peer.times(args)
                if times[peer.label] > 1:
                    result.reason = f"1 pass of {times[peer.label]} timed"
            row.peers.append(result)
        taken = interleave(
            calls,
            device=self.device,
            budget_s=self.settings.budget_s,
            rounds=self.settings.rounds,
            clock=clock,
        )
        seconds_of = {name: [s * times[name] for s in samples] for name, samples in taken.seconds.items()}
        own = seconds_of[spec.name]
        row.samples_s, row.inner = own, taken.inner[spec.name]
        row.noise = abs(taken.noise_floor().value - 1)
        self._rates(args, median(own))
        for result in row.peers:
            if result.available:
                result.samples_s = seconds_of[result.name]
                result.median_s = median(result.samples_s).value
                ratio = paired_ratio(result.samples_s, own)
                result.ratio, result.ratio_low, result.ratio_high = ratio.value, ratio.low, ratio.high

    def _peers(self) -> Iterator[Peer]:
        return (peer for peer in self.job.subject.peers if wanted(peer.label, self.settings.peers))

    def _rates(self, args: Args, taken: Interval) -> None:
        row, spec = self.row, self.job.spec
        row.median_s, row.low_s, row.high_s = taken.value, taken.low, taken.high
        cost = self.cost = spec.cost(*args)
        self.pattern = roofline.pattern(cost, roofline.tensor_bytes(args), spec.mutates)
        row.read_bytes, row.written_bytes, row.flops = cost.read, cost.written, cost.flops
        row.elements = elements(spec, args)
        row.ns_per_element = taken.value * 1e9 / row.elements if row.elements else None
        row.gb_per_s = (cost.read + cost.written) / taken.value * 1e-9
        row.gflop_per_s = cost.flops / taken.value * 1e-9 if cost.flops else None

    def place(self, roof: roofline.Roofline) -> None:
        """Set the row against what the machine can do."""
        if self.row.median_s is not None and self.cost is not None:
            floor = roof.floor(self.cost, self.pattern)
            self.row.floor_s, self.row.bound = floor.seconds, floor.bound
            self.row.percent_of_roofline = 100 * floor.seconds / self.row.median_s

    def _dispatch(self) -> float:
        """The time of a call with next to no work: the dispatcher, the checks and the kernel's own entry."""
        key = (self.job.spec.name, self.job.dtype, self.job.threads)
        if key not in self.dispatch:
            call = _call(self.job, self.job.subject.tiny(self.device, self.job.dtype))
            clock = Clock(torch.device("cpu"))  # the host's time, also where the device works on
            inner, _ = calibrate(clock, call)
            self.dispatch[key] = median([clock(call, inner) / inner for _ in range(9)]).value
        return self.dispatch[key]


def _call(job: Job, args: Args) -> Callable[[], object]:
    """What is timed."""
    if job.subject.call is not None:
        return job.subject.call(args)
    op = job.spec.op
    return lambda: op(*args)


def elements(spec: OpSpec, args: Args) -> int:
    """What a time is divided by: elements updated in place, else those of the largest tensor argument."""
    if spec.mutates:
        return sum(t.numel() for t in spec.updated(args))
    return max((a.numel() for a in args if isinstance(a, torch.Tensor)), default=0)


def _work(spec: OpSpec, args: Args) -> int:
    terms = max(
        (len(a) for a in args if isinstance(a, torch.Tensor) and a.dtype == torch.int64 and a.dim()),
        default=1,
    )
    return elements(spec, args) * terms


def _meta(job: Job, device: torch.device) -> Args | None:
    """The case's arguments without their memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    assert job.case is not None
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return job.case.make(device, job.dtype, torch.Generator())
    except Exception:  # a maker that reads its data cannot be run without it
        return None
