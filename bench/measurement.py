"""Measures one row: the gate, then operator and peers in turns, then the percent of the roofline."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from leanops import _registry, info
from leanops._registry import OpSpec
from leanops.autotune import fingerprint
from leanops.autotune.measure import Call, Clock, Interval, calibrate, interleave, median, paired_ratio, rotating
from leanops.bench import accuracy, memory, roofline
from leanops.bench.peers import Args, OtherInputs, Peer, Unavailable, wanted
from leanops.bench.plan import Job, Settings
from leanops.bench.results import PeerResult
from leanops.bench.text import NO_TIME

COPIES = 8  # at most so many copies of a small case's inputs, which together exceed the cache
REFERENCE_ALONE = "only the reference serves this operator here (see `leanops info`); too slow at this size"
LEAST_ROUNDS = 3
PACKAGE_S = 10.0  # seconds kept for the import of a peer's package

Dispatch = dict[tuple[str, torch.dtype, int], float]


@dataclass(frozen=True)
class Timed:
    """A call with the name under which its times are kept."""

    name: str
    call: Call

    def __call__(self) -> object:
        return self.call()


class Limit:
    """Seconds that a row may take; ``None`` for as long as it needs."""

    def __init__(self, clock: Clock, seconds: float | None) -> None:
        self.clock, self.seconds, self.started = clock, seconds, clock.now()

    @property
    def spent(self) -> float:
        return self.clock.now() - self.started

    @property
    def left(self) -> float:
        return math.inf if self.seconds is None else self.seconds - self.spent


class Turns:
    """The calls that are timed in turns, the operator's first, and how long a round of them takes."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.calls: dict[str, Call] = {}
        self.inner: dict[str, int] = {}  # calls in a sample
        self.passes: dict[str, int] = {}  # how often a peer's call is needed to do the work of the operator's
        self._sample_s: dict[str, float] = {}

    def add(self, name: str, call: Call) -> float:
        """Add a call to the turns. Returns the seconds that one takes."""
        self.calls[name], self.passes[name] = Timed(name, call), 1
        self.inner[name], seconds = calibrate(self.clock, self.calls[name])
        self._sample_s[name] = seconds * self.inner[name]
        return seconds

    def drop(self, name: str) -> None:
        for kept in (self.calls, self.passes, self.inner, self._sample_s):
            kept.pop(name, None)

    @property
    def round_s(self) -> float:
        """Seconds of a round, in which the first takes part twice."""
        samples = list(self._sample_s.values())
        return samples[0] + sum(samples)


class Measurement:
    """Measures one row."""

    def __init__(
        self, job: Job, settings: Settings, device: torch.device, dispatch: Dispatch, clock: Clock | None = None
    ) -> None:
        self.job, self.settings, self.device, self.row = job, settings, device, job.row(device)
        self.dispatch = dispatch  # times that other rows have measured
        self.clock = clock or Clock(device)
        self.least_s: float | None = None  # seconds of the row with its main peer alone, in LEAST_ROUNDS rounds
        self.cost: _registry.Cost | None = None
        self.pattern = ""
        self.same_result: set[str] = set()  # peers that return what the operator returns

    def take(self, limit_s: float | None = None) -> None:
        """Measure. Where ``limit_s`` is short, only the main peer takes part, in LEAST_ROUNDS rounds."""
        try:
            self._measure(Limit(self.clock, limit_s))
        except Unavailable as reason:
            self.row.status, self.row.reason = "skipped", str(reason)

    def skip(self, reason: str) -> None:
        self.row.status, self.row.reason = "skipped", reason

    def _inputs(self) -> Args:
        if self.job.case is None:
            raise Unavailable(self.job.reason)
        return self.job.case.make(self.device, self.job.dtype, torch.Generator().manual_seed(0))

    def _measure(self, limit: Limit) -> None:
        row, spec = self.row, self.job.spec
        self._check_size()
        args = self._inputs()
        peers = list(self._peers())
        gated = peers if limit.seconds is None else peers[:1]
        gate, peer_errors = accuracy.check(spec, self.job.subject, args, self.job.dtype, gated)
        row.gate = gate
        if not gate.passed:
            row.status, row.reason = "wrong", gate.reason
            return
        self._time(args, peers, peer_errors, limit)
        row.peak_bytes = memory.peak_bytes(lambda: spec.op(*args), self.device)
        row.dispatch_s = self._dispatch()

    def _check_size(self) -> None:
        """Raise Unavailable where the shapes alone show that memory or time do not suffice."""
        args = without_memory(self.job, self.device)
        if args is None:
            return
        # the inputs, a stored direction and a temporary of their size, and 1 GiB for making the inputs
        needed, available = 3 * roofline.tensor_bytes(args) + (1 << 30), fingerprint.memory_available(self.device)
        if needed > available:
            raise Unavailable(f"needs about {needed / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are available")
        if by_reference(self.job, self.device) and work(self.job.spec, args) > self.job.subject.reference_limit:
            raise Unavailable(REFERENCE_ALONE)

    def _copies(self, args: Args) -> list[Args]:
        held = max(roofline.tensor_bytes(args), 1)
        wanted = math.ceil(2 * fingerprint.last_level_cache(self.device) / held)
        return [args, *(self._inputs() for _ in range(min(COPIES, wanted) - 1))]

    def _time(self, args: Args, peers: list[Peer], peer_errors: dict[str, float], limit: Limit) -> None:
        row, spec = self.row, self.job.spec
        copies = self._copies(args)
        turns = Turns(self.clock)
        turns.add(spec.name, rotating([_timed(self.job, a) for a in copies]))
        self.least_s = limit.spent + LEAST_ROUNDS * turns.round_s
        for peer in peers:
            result = PeerResult(peer.label, peer.origin, error=peer_errors.get(peer.name))
            try:
                self._invite(peer, copies, turns, limit)
            except OtherInputs:
                continue
            except Exception as error:  # an error in another package must not end the run
                turns.drop(peer.label)
                result.available, result.reason = False, (str(error).strip() or repr(error)).split("\n")[0]
            else:
                turns.passes[peer.label] = passes = peer.times(spec.bind(*args))
                result.reason = f"1 pass of {passes} timed" if passes > 1 else ""
            row.peers.append(result)
        least, most = self.settings.rounds
        if least * turns.round_s > limit.left:
            least = LEAST_ROUNDS
        budget_s = min(self.settings.budget_s, max(limit.left, 0.0))
        taken = interleave(
            turns.calls,
            device=self.device,
            budget_s=budget_s,
            rounds=(least, most),
            clock=self.clock,
            inner=turns.inner,
        )
        seconds_of = {name: [s * turns.passes[name] for s in samples] for name, samples in taken.seconds.items()}
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

    def _invite(self, peer: Peer, copies: list[Args], turns: Turns, limit: Limit) -> None:
        """Add a peer to the turns. The first that can run is the main one. Others must leave time for the rounds."""
        main = len(turns.calls) == 1
        needed = (LEAST_ROUNDS + 1) * turns.round_s + (PACKAGE_S if peer.origin == "package" else 0.0)
        if not main and needed > limit.left:
            raise Unavailable(NO_TIME)
        seconds = turns.add(peer.label, rotating([peer.make(self.job.spec.bind(*a)) for a in copies]))
        if not (main and self.settings.quick) and seconds > self.settings.peer_limit_s:
            raise Unavailable(f"one call takes {seconds:.2f} s, over the limit of {self.settings.peer_limit_s:g} s")
        if main:
            self.least_s = limit.spent + LEAST_ROUNDS * turns.round_s
        elif LEAST_ROUNDS * turns.round_s > limit.left:
            raise Unavailable(NO_TIME)
        if peer.same_result:
            self.same_result.add(peer.label)

    def _peers(self) -> Iterator[Peer]:
        return (peer for peer in self.job.subject.peers if wanted(peer.label, self.settings.peers))

    def _rates(self, args: Args, taken: Interval) -> None:
        row, spec = self.row, self.job.spec
        row.median_s, row.low_s, row.high_s = taken.value, taken.low, taken.high
        cost = self.cost = spec.cost(spec.bind(*args))
        self.pattern = roofline.pattern(cost, roofline.tensor_bytes(args), spec.mutates)
        row.read_bytes, row.written_bytes, row.flops = cost.read, cost.written, cost.flops
        row.elements = elements(spec, args)
        row.ns_per_element = taken.value * 1e9 / row.elements if row.elements else None
        row.gb_per_s = (cost.read + cost.written) / taken.value * 1e-9
        row.gflop_per_s = cost.flops / taken.value * 1e-9 if cost.flops else None

    def place(self, roof: roofline.Roofline) -> None:
        """Compare the row with the fastest way to its result on this machine.

        That is the time that the measured rates allow, or a peer with the same result, or the row itself where it is
        faster than both, which is possible because the rates were measured at other moments.
        """
        row = self.row
        if row.median_s is None or self.cost is None:
            return
        floor = roof.floor(self.cost, self.pattern)
        ways = [(floor.seconds, floor.bound)]
        ways += [(p.median_s, p.name) for p in row.peers if p.name in self.same_result and p.median_s is not None]
        row.floor_s, row.bound = min(ways)
        if row.median_s < row.floor_s:
            above = 100 * (row.floor_s / row.median_s - 1)
            row.reason = f"{above:.0f}% faster than the machine's measured rates allow: it is its own ceiling"
            row.floor_s = row.median_s
        row.percent_of_roofline = 100 * row.floor_s / row.median_s

    def _dispatch(self) -> float:
        """Seconds of a call with next to no work: the dispatcher, the checks and the entry of the kernel."""
        key = (self.job.spec.name, self.job.dtype, self.job.threads)
        if key not in self.dispatch:
            call = Timed("dispatch", _timed(self.job, self.job.subject.tiny(self.device, self.job.dtype)))
            clock = Clock(torch.device("cpu"))  # the host's time; the device may still be working
            inner, _ = calibrate(clock, call)
            self.dispatch[key] = median([clock(call, inner) / inner for _ in range(9)]).value
        return self.dispatch[key]


def _timed(job: Job, args: Args) -> Callable[[], object]:
    """The function whose time is the row's."""
    if job.subject.timed is not None:
        return job.subject.timed(job.spec.bind(*args))
    op = job.spec.op
    return lambda: op(*args)


def by_reference(job: Job, device: torch.device) -> bool:
    return info.serving(job.spec, device.type) == "reference"


def elements(spec: OpSpec, args: Args) -> int:
    """The elements that are updated in place, else those of the largest tensor argument."""
    if spec.mutates:
        return sum(t.numel() for t in spec.updated(args))
    return max((a.numel() for a in args if isinstance(a, torch.Tensor)), default=0)


def work(spec: OpSpec, args: Args) -> int:
    """Elements times seeds."""
    terms = max(
        (len(a) for a in args if isinstance(a, torch.Tensor) and a.dtype == torch.int64 and a.dim()),
        default=1,
    )
    return elements(spec, args) * terms


def without_memory(job: Job, device: torch.device) -> Args | None:
    """The case's arguments as fake tensors, which have no memory; None where the maker reads a tensor's data."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    if job.case is None:
        return None
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            args: tuple[Any, ...] = job.case.make(device, job.dtype, torch.Generator())
            return args
    except Exception:
        return None
