"""The three tiers of the tests, and the time that each family may take in each of them.

==============  ================  ==================================================================================
tier            command           what it adds
==============  ================  ==================================================================================
``default``     ``make test``     every claim once: a case in one dtype (rotating), few examples of hypothesis
``ci``          ``.ci/run``       agreement, NaN-filled outputs and thread counts in every dtype, more examples
``exhaustive``  ``make            every dtype of every case, a thousand examples and more, full matrices of emulator and
                exhaustive``      interpreter, races between threads, killed runs, tensors of 2^31 elements
==============  ================  ==================================================================================

A tier drops repetition and no claim. A test that belongs to a later tier has the mark ``ci`` or ``exhaustive``; a test
that repeats itself over dtypes or sizes asks :func:`at_least`. docs/testing.md says which tier holds which claim.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
from families import FAMILIES

TIERS = ("default", "ci", "exhaustive")
EXAMPLES = {"default": 15, "ci": 60, "exhaustive": 1000}  # of hypothesis; a test may ask for a multiple of them
OVER = 1.5  # a family that takes this many times its budget fails the run
SLOWEST = 20
ROOT = Path(__file__).parent
_T = TypeVar("_T")


def tier() -> str:
    """The tier of this run."""
    name = os.environ.get("LEANOPS_TIER", "default")
    if name not in TIERS:
        raise pytest.UsageError(f"LEANOPS_TIER must be one of {', '.join(TIERS)}, got {name!r}")
    return name


def at_least(name: str) -> bool:
    """Whether this run holds the claims of a tier."""
    return TIERS.index(tier()) >= TIERS.index(name)


def rotating(rows: Sequence[Sequence[_T]], until: str) -> list[_T]:
    """Of each row one entry, another one from row to row; every entry from the tier ``until`` on."""
    if at_least(until):
        return [entry for row in rows for entry in row]
    return [row[i % len(row)] for i, row in enumerate(rows) if row]


def examples(times: float = 1) -> int:
    """How many examples hypothesis tries."""
    return max(1, round(times * EXAMPLES[tier()]))


def family_of(item: pytest.Item) -> str:
    """The family whose budget a test counts for: that of its operator, or of a folder or file with its name."""
    spec = getattr(item, "callspec", None) and item.callspec.params.get("spec")  # type: ignore[attr-defined]
    if spec is not None:
        name: str = spec.reference.__module__.split(".")[1]
        return name if name in FAMILIES else "shared"
    parts = item.path.relative_to(ROOT).with_suffix("").parts
    words = {word for part in parts for word in part.split("_")}
    return next((family for family in FAMILIES if family in words), "shared")


def budget_file(family: str) -> Path:
    return ROOT / "budget.json" if family == "shared" else ROOT / family / "budget.json"


def budget(family: str) -> float:
    """Core-seconds that the tests of a family may take in this tier: 0 without a file."""
    path = budget_file(family)
    seconds: float = json.loads(path.read_text())[tier()] if path.exists() else 0.0
    return seconds


def also_spent(item: pytest.Item, seconds: float) -> None:
    """Count CPU time that another process has spent for a test."""
    item.stash[_CLOCK] = item.stash.get(_CLOCK, sum(os.times()[:4])) - seconds


class Plugin:
    """Leaves out what belongs to later tiers, and measures what each family takes."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self.tests: dict[str, float] = defaultdict(float)
        self.whole = False

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        later = [item for item in items if any(item.get_closest_marker(t) and not at_least(t) for t in TIERS[1:])]
        if later:
            config.hook.pytest_deselected(items=later)
            items[:] = [item for item in items if item not in set(later)]

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        item.stash[_FAMILY] = family_of(item)
        yield

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
        report = (yield).get_result()
        now = sum(os.times()[:4])
        report.family, report.cpu = item.stash[_FAMILY], now - item.stash.get(_CLOCK, now)
        item.stash[_CLOCK] = now

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        item.stash[_CLOCK] = sum(os.times()[:4])

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.spent[report.family] += report.cpu
        self.tests[report.nodeid] += report.cpu

    def over(self) -> list[str]:
        """Families beyond their budget; only of a run of the whole suite, which budgets are for."""
        return [f for f, seconds in self.spent.items() if self.whole and seconds > OVER * budget(f)]

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self.whole = session.config.args == session.config.getini("testpaths") and not session.config.option.keyword
        if self.over() and not session.exitstatus:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if not self.spent:
            return
        write = terminalreporter.write_line
        terminalreporter.section(f"core-seconds of each family in the tier {tier()}")
        for family in sorted(self.spent):
            verdict = f"OVER {OVER} x ITS BUDGET" if family in self.over() else ""
            if not (path := budget_file(family)).exists():
                verdict = f"HAS NO BUDGET: add {path.relative_to(ROOT.parent)}"
            write(f"{family:<12} {self.spent[family]:8.0f} of {budget(family):6.0f}  {verdict}".rstrip())
        write(f"{'all':<12} {sum(self.spent.values()):8.0f}")
        terminalreporter.section(f"slowest {SLOWEST} tests, core-seconds")
        for name, seconds in sorted(self.tests.items(), key=lambda pair: -pair[1])[:SLOWEST]:
            write(f"{seconds:8.1f}  {name}")
        if path := os.environ.get("LEANOPS_TEST_TIMES"):
            Path(path).write_text(json.dumps(self.tests, indent=1))


_FAMILY, _CLOCK = pytest.StashKey[str](), pytest.StashKey[float]()
