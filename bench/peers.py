"""What an operator is measured against, described by family.

A :class:`Subject` holds what a benchmark needs to know of an operator beyond its OpSpec: peers over the same inputs,
where to look whether the result is right, inputs that are all dispatch, and cases on real weights. A family adds
its subjects in a file ``peers_<family>.py`` that :func:`subjects` finds; an operator without one is measured alone.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from leanops import _registry, bench
from leanops._registry import Case, OpSpec

Args = tuple[Any, ...]


@dataclass(frozen=True)
class Peer:
    """Another way to do the work.

    ``origin`` is ``"torch"``, ``"package"`` (the real one, installed) or ``"re-expressed"`` (written here from the
    published formula). ``make`` builds a call over the operator's arguments; it raises :class:`Unavailable` with the
    reason where that cannot be, :class:`OtherInputs` where it should not be. A call stands for ``times(args)`` of
    itself where one pass of many is timed.
    """

    name: str
    origin: str
    make: Callable[[Args], Callable[[], object]]
    times: Callable[[Args], int] = lambda args: 1
    same_result: bool = False  # the call returns what the operator returns, so its error is shown too

    @property
    def label(self) -> str:
        return f"{self.name} (re-expressed)" if self.origin == "re-expressed" else self.name


class Unavailable(Exception):
    """A peer or a case cannot run here; the text says why."""


class OtherInputs(Unavailable):
    """A peer does other work than these inputs ask for, so a row over them need not mention it."""


@dataclass(frozen=True)
class Probe:
    """A part of a result small enough for the reference: the reference's arguments, taken before the operator runs,
    and where the same values lie in the operator's arguments and result."""

    reference_args: Args
    actual: Callable[[Any], list[Tensor]]  # given what the operator returned
    wanted: Callable[[list[Tensor]], list[Tensor]] = lambda results: results  # what of the reference's results counts


@dataclass(frozen=True)
class Subject:
    """``tiny`` makes arguments with next to no work; ``probes`` picks what the accuracy gate compares;
    ``cases`` yields further benchmark cases; ``unavailable_cases`` names those that cannot run, with the reason.
    ``call`` makes what is timed, where users and peers do not call an operator but what is built on it, ``called``."""

    name: str
    peers: tuple[Peer, ...]
    probes: Callable[[Args], list[Probe]]
    tiny: Callable[[torch.device, torch.dtype], Args]
    cases: Callable[[], Sequence[Case]] = tuple
    unavailable_cases: Callable[[], dict[str, str]] = dict
    call: Callable[[Args], Callable[[], object]] | None = None
    called: str = ""
    quick: Callable[[str], bool] = lambda case: True  # whether a case belongs to a run of two minutes
    headline: tuple[str, ...] = ()  # the case that --quick shows on any machine, then cheaper ones in its place
    small: Case | None = None  # in place of these on a machine for which all of them are too slow
    reference_limit: float = 1 << 18  # elements x seeds: beyond this the reference is too slow to be timed

    def bench_cases(self, spec: OpSpec) -> dict[str, Case]:
        return {case.name: case for case in (*spec.cases, *self.cases()) if case.bench}

    def small_case(self, spec: OpSpec) -> Case:
        return self.small or next((case for case in spec.cases if not case.bench), spec.cases[0])

    def in_quick(self, case: str) -> bool:
        return self.quick(case) or case in self.headline


def wanted(label: str, parts: Sequence[str] | None) -> bool:
    """Whether a peer takes part: where one of the parts stands in its label, or where ``parts`` is None."""
    return parts is None or any(part.lower() in label.lower() for part in parts)


def check_wanted(parts: Sequence[str] | None, labels: Iterable[str]) -> None:
    """Refuse a part that stands in none of the labels."""
    labels = list(dict.fromkeys(labels))
    if unknown := [part for part in parts or () if not any(wanted(label, (part,)) for label in labels)]:
        there = f"there are {'; '.join(labels)}" if labels else "there are none"
        raise ValueError(f"--peers: no peer named {', '.join(unknown)}; {there}")


_subjects: dict[str, Subject] = {}


def add(subject: Subject) -> None:
    _subjects[subject.name] = subject


def subjects() -> dict[str, Subject]:
    """Every subject by the name of its operator, those with a case for benchmarks, in the operators' order."""
    for module in pkgutil.iter_modules(bench.__path__, "leanops.bench."):
        if module.name.startswith("leanops.bench.peers_"):
            importlib.import_module(module.name)
    found = {}
    for spec in _registry.specs():
        if spec.name in _subjects or any(case.bench for case in spec.cases):
            found[spec.name] = _subjects.get(spec.name) or alone(spec)
    return found


def results(spec: OpSpec, args: Args, returned: Any) -> list[Tensor]:
    """What a call wrote or returned."""
    if spec.mutates:
        return spec.mutated(args)
    return [returned] if isinstance(returned, Tensor) else list(returned)


def alone(spec: OpSpec) -> Subject:
    """An operator of which no more is known than its OpSpec: no peers, and the gate compares the whole result."""

    def probes(args: Args) -> list[Probe]:
        before = tree_map_only(Tensor, Tensor.clone, args)
        return [Probe(before, lambda returned: results(spec, args, returned))]

    def tiny(device: torch.device, dtype: torch.dtype) -> Args:
        case = next((c for c in spec.cases if not c.bench), spec.cases[0])
        return case.make(device, dtype, torch.Generator().manual_seed(0))

    return Subject(spec.name, peers=(), probes=probes, tiny=tiny, reference_limit=math.inf)
