"""What ``leanops bench`` measures: every case of every operator in every dtype at every thread count."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch

from leanops import _registry, info
from leanops._registry import Case, OpSpec
from leanops.autotune import fingerprint
from leanops.bench.peers import Subject, check_wanted, subjects
from leanops.bench.results import Row
from leanops.common.dtypes import dtype_name

Group = tuple[str, torch.dtype]  # an operator's name and a dtype


@dataclass(frozen=True)
class Settings:
    ops: tuple[str, ...] = ()  # all where empty
    device: str = "cpu"
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    threads: tuple[int, ...] = ()  # one and all where empty
    peers: tuple[str, ...] | None = None  # parts of names; none where empty, all where None
    case: str = ""  # a regular expression that must match somewhere in the key
    quick: bool = False
    size: str = "101M"  # of the transformer of mezo-step

    @property
    def budget_s(self) -> float:
        return 0.7 if self.quick else 4.0

    @property
    def rounds(self) -> tuple[int, int]:
        return (5, 30) if self.quick else (7, 100)

    @property
    def peer_limit_s(self) -> float:
        """Seconds. A peer whose single call takes longer is left out, unless it is the main one."""
        return 0.6 if self.quick else 20.0


@dataclass(frozen=True)
class Job:
    """One row to be measured."""

    spec: OpSpec
    subject: Subject
    case: Case | None  # None where the case cannot run; then there is a reason
    name: str
    dtype: torch.dtype
    threads: int
    reason: str = ""

    @property
    def group(self) -> Group:
        return self.spec.name, self.dtype

    def row(self, device: torch.device) -> Row:
        dtype = dtype_name(self.dtype)
        key = f"{self.spec.name}/{self.name}/{dtype}/{device}"
        if device.type == "cpu":
            key += f"/{self.threads}t"
        served = info.serving(self.spec, device.type)
        if self.subject.timed_name:
            served = f"{self.subject.timed_name} on {served}"
        return Row(
            key=key,
            status="ok",
            op=self.spec.name,
            case=self.name,
            dtype=dtype,
            device=str(device),
            threads=self.threads,
            backend=served,
        )

    def small(self) -> Job:
        """A job of the same operator on an input that is small enough for any machine."""
        case = self.subject.small_case(self.spec)
        return replace(self, case=case, name=case.name, reason="")


def device_of(name: str) -> torch.device:
    """The device of this name. Raises a ValueError where the machine has none."""
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch sees no CUDA device")
    return device


def thread_counts(settings: Settings) -> tuple[int, ...]:
    if torch.device(settings.device).type != "cpu":
        return (torch.get_num_threads(),)
    return settings.threads or tuple(sorted({1, fingerprint.cores()}))


def plan(settings: Settings) -> list[Job]:
    """Every job that the settings ask for, operator by operator."""
    known = subjects()
    if unknown := [op for op in settings.ops if op not in known]:
        raise ValueError(f"no operator named {', '.join(unknown)}; there are {', '.join(known)}")
    device = device_of(settings.device)
    matches = re.compile(settings.case).search
    jobs = []
    for spec in _registry.specs():
        if spec.name not in known or (settings.ops and spec.name not in settings.ops):
            continue
        subject = known[spec.name]
        cases, absent = subject.bench_cases(spec), subject.unavailable_cases()
        for name in dict.fromkeys((*cases, *absent)):
            if settings.quick and not subject.in_quick(name):
                continue
            for dtype in (getattr(torch, name_of_dtype) for name_of_dtype in settings.dtypes):
                if dtype not in spec.dtypes:
                    continue
                for threads in thread_counts(settings):
                    job = Job(spec, subject, cases.get(name), name, dtype, threads, absent.get(name, ""))
                    if matches(job.row(device).key):
                        jobs.append(job)
    if not jobs:
        raise ValueError("no case matches")
    check_wanted(settings.peers, (peer.label for job in jobs for peer in job.subject.peers))
    return jobs
