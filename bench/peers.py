"""What each operator is measured against.

A :class:`Subject` holds what a benchmark needs to know of an operator beyond its OpSpec: peers over the same inputs,
the parts of a result that are checked, inputs with next to no work, and cases on real weights. A family adds its
subjects in a file ``peers_<family>.py``, which :func:`subjects` finds. An operator without a subject is measured
without peers.
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
from leanops.common.call import flat

Args = tuple[Any, ...]  # an operator's positional arguments


@dataclass(frozen=True)
class Peer:
    """Another way to do the work.

    ``origin`` is ``"torch"``, ``"package"`` (the published package, installed) or ``"re-expressed"`` (written here from
    the published formula). ``make(call)`` returns a function that does the work of the operator's call. It raises
    :class:`Unavailable` with the reason where the peer cannot run, and :class:`OtherInputs` where the peer is not meant
    for these inputs. Where the function does one pass of many, its time is multiplied by ``times(call)``.
    """

    name: str
    origin: str
    make: Callable[[Any], Callable[[], object]]
    times: Callable[[Any], int] = lambda call: 1
    same_result: bool = False  # the function returns what the operator returns, so its error is shown too

    @property
    def label(self) -> str:
        return f"{self.name} (re-expressed)" if self.origin == "re-expressed" else self.name


class Unavailable(Exception):
    """A peer or a case cannot run here; the text says why."""


class OtherInputs(Unavailable):
    """A peer is not meant for these inputs. Their row does not mention it."""


@dataclass(frozen=True)
class Probe:
    """A part of a result that is small enough for the reference.

    ``reference_call`` is a call over that part alone, on copies of what the operator writes. ``actual(returned)`` finds
    the part in what the operator wrote or returned. ``wanted(results)`` picks those of the reference's results that
    are compared.
    """

    reference_call: Any
    actual: Callable[[Any], list[Tensor]]
    wanted: Callable[[list[Tensor]], list[Tensor]] = lambda results: results


@dataclass(frozen=True)
class Subject:
    """What a benchmark knows of an operator beyond its OpSpec.

    ``probes(call)`` picks the parts of a result that the accuracy gate compares. ``tiny(device, dtype)`` makes
    arguments with next to no work. ``cases()`` are further benchmark cases; ``unavailable_cases()`` maps the names of
    cases that cannot run to the reason. ``timed(call)`` makes the function that is timed where users do not call the
    operator itself; ``timed_name`` names what they call.
    """

    name: str
    peers: tuple[Peer, ...]
    probes: Callable[[Any], list[Probe]]
    tiny: Callable[[torch.device, torch.dtype], Args]
    cases: Callable[[], Sequence[Case]] = tuple
    unavailable_cases: Callable[[], dict[str, str]] = dict
    timed: Callable[[Any], Callable[[], object]] | None = None
    timed_name: str = ""
    quick: Callable[[str], bool] = lambda case: True  # whether --quick measures a case of this name
    headline: tuple[str, ...] = ()  # names of the case that --quick shows first, and of cheaper substitutes
    small: Case | None = None  # the last substitute, for a machine on which all of these are too slow
    reference_limit: float = 1 << 18  # elements x seeds: above this the reference is too slow to be timed

    def bench_cases(self, spec: OpSpec) -> dict[str, Case]:
        return {case.name: case for case in (*spec.cases, *self.cases()) if case.bench}

    def small_case(self, spec: OpSpec) -> Case:
        return self.small or next((case for case in spec.cases if not case.bench), spec.cases[0])

    def in_quick(self, case: str) -> bool:
        return self.quick(case) or case in self.headline


def wanted(label: str, parts: Sequence[str] | None) -> bool:
    """Whether a peer takes part: its label contains one of the parts, or ``parts`` is None."""
    return parts is None or any(part.lower() in label.lower() for part in parts)


def check_wanted(parts: Sequence[str] | None, labels: Iterable[str]) -> None:
    """Raise a ValueError for a part that no label contains."""
    labels = list(dict.fromkeys(labels))
    if unknown := [part for part in parts or () if not any(wanted(label, (part,)) for label in labels)]:
        known = f"there are {'; '.join(labels)}" if labels else "there are none"
        raise ValueError(f"--peers: no peer named {', '.join(unknown)}; {known}")


_subjects: dict[str, Subject] = {}


def add(subject: Subject) -> None:
    _subjects[subject.name] = subject


def subjects() -> dict[str, Subject]:
    """The subject of every operator that has a case for benchmarks, by name, in the operators' order."""
    for module in pkgutil.iter_modules(bench.__path__, "leanops.bench."):
        if module.name.startswith("leanops.bench.peers_"):
            importlib.import_module(module.name)
    found = {}
    for spec in _registry.specs():
        if spec.name in _subjects or any(case.bench for case in spec.cases):
            found[spec.name] = _subjects.get(spec.name) or alone(spec)
    return found


def results(spec: OpSpec, args: Args, returned: Any) -> list[Tensor]:
    """The tensors that a call wrote or returned."""
    if spec.mutates:
        return spec.mutated(args)
    return [returned] if isinstance(returned, Tensor) else list(returned)


def alone(spec: OpSpec) -> Subject:
    """The subject of an operator without one of its family: no peers, and the gate compares the whole result."""

    def probes(call: Any) -> list[Probe]:
        before = tree_map_only(Tensor, Tensor.clone, call)
        return [Probe(before, lambda returned: results(spec, flat(call), returned))]

    def tiny(device: torch.device, dtype: torch.dtype) -> Args:
        case = next((c for c in spec.cases if not c.bench), spec.cases[0])
        return case.make(device, dtype, torch.Generator().manual_seed(0))

    return Subject(spec.name, peers=(), probes=probes, tiny=tiny, reference_limit=math.inf)
