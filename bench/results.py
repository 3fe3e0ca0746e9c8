"""What ``leanops bench`` and ``leanops mezo-step`` found: the same in Python and in their JSON files."""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch

from leanops import _native
from leanops.autotune import fingerprint
from leanops.bench.roofline import Roofline
from leanops.bench.typed_json import from_json, misfit, to_json

_R = TypeVar("_R", bound="Results")


def _positive(value: float) -> bool:
    return 0 < value <= sys.float_info.max


@dataclass(frozen=True)
class Gate:
    """``error`` is the largest absolute difference over the largest value; it must not exceed ``bound``.

    A file holds null for an error that is not finite.
    """

    passed: bool
    error: float | None
    bound: float | None
    against: str
    reason: str = ""


@dataclass
class PeerResult:
    name: str
    origin: str = ""
    available: bool = True
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
    status: str
    op: str = ""
    case: str = ""
    dtype: str = ""
    device: str = ""
    threads: int = 1
    backend: str = ""
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
    gate: Gate | None = None
    peak_bytes: int | None = None
    dispatch_s: float | None = None
    peers: list[PeerResult] = field(default_factory=list)


@dataclass(frozen=True)
class BackendState:
    loaded: bool
    detail: str


@dataclass(kw_only=True)
class Results:
    """The fields of every command's results. ``fingerprint`` names all that a time depends on."""

    SCHEMA: ClassVar[str]

    fingerprint: dict[str, Any]
    created: str = ""
    leanops: str = ""
    command: list[str] = field(default_factory=list)
    backends: dict[str, BackendState] = field(default_factory=dict)

    @property
    def processor(self) -> str:
        name: str = (self.fingerprint.get("gpu") or self.fingerprint["cpu"])["name"]
        return name

    @property
    def software(self) -> dict[str, str]:
        """The versions of the installed packages."""
        return {name: version for name, version in self.fingerprint["software"].items() if version}

    def to_json(self) -> dict[str, Any]:
        return {"schema": self.SCHEMA, **to_json(self)}

    def check(self) -> None:
        """Raise a ValueError for numbers that no run gives and that later arithmetic cannot use."""


@dataclass(kw_only=True)
class OperatorResults(Results):
    SCHEMA = "leanops-bench/1"

    settings: dict[str, Any] = field(default_factory=dict)
    roofline: list[Roofline]
    noise_floor: float | None = None
    drift: float | None = None  # None where the machine was measured only once
    peak_how: str = ""
    rows: list[Row]

    def check(self) -> None:
        for name, value in (("noise_floor", self.noise_floor), ("drift", self.drift)):
            if value is not None and value != 0 and not _positive(value):
                raise misfit(name, "a number, 0 or more, or null", value)
        for i, roof in enumerate(self.roofline):
            for kind, rates in (("bandwidth", roof.bandwidth), ("gemm", roof.gemm)):
                for name, rate in rates.items():
                    if not _positive(rate):
                        raise misfit(f"roofline[{i}].{kind}.{name}", "a positive number", rate)
        for i, row in enumerate(self.rows):
            if row.status == "ok" and not (row.samples_s and all(map(_positive, row.samples_s))):
                raise misfit(f"rows[{i}].samples_s", "a list of positive times", row.samples_s)


@dataclass
class StepRow:
    """``ratio`` is the time over that of two forward passes."""

    name: str
    median_s: float
    samples_s: list[float]
    ratio: float
    ratio_low: float
    ratio_high: float


@dataclass
class StepCase:
    dtype: str
    distribution: str
    threads: int
    parameters: int
    tokens: int
    noise: float
    rows: list[StepRow]


@dataclass(kw_only=True)
class StepResults(Results):
    SCHEMA = "leanops-mezo-step/1"

    settings: dict[str, Any] = field(default_factory=dict)
    cases: list[StepCase]


def header(device: torch.device, command: Sequence[str], sources: dict[str, str] | None = None) -> dict[str, Any]:
    """The fields of :class:`Results` for a run on this machine now."""
    return {
        "fingerprint": fingerprint.fingerprint(device, sources),
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "leanops": _native.version(),
        "command": list(command),
        "backends": {name: BackendState(b.loaded, b.detail) for name, b in _native.backends().items()},
    }


def load(path: str | Path, kind: type[_R]) -> _R:
    """The results in a JSON file.

    Raises:
        ValueError: the file is not JSON, has another schema, or an entry is not what it must be.
    """
    try:
        found = json.loads(Path(path).read_bytes())
    except ValueError as error:  # not JSON, or not text
        raise ValueError(f"{path} is not JSON: {error}") from error
    schema = found.get("schema") if isinstance(found, dict) else type(found).__name__
    if schema != kind.SCHEMA:
        raise ValueError(f"{path} must have schema {kind.SCHEMA}, got {schema}")
    try:
        results = from_json(kind, found)
        results.check()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return results
