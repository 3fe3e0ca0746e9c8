"""The families, found by their folders, and what each keeps in its folder of tests for the suites that all share."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
FAMILIES = sorted(path.parent.name for path in ROOT.glob("pyops/*/specs.py"))


def having(file: str) -> list[str]:
    """Families that have ``tests/FAMILY/FILE``."""
    return [family for family in FAMILIES if (TESTS / family / file).exists()]


def module(family: str, name: str) -> ModuleType:
    """``tests/FAMILY/NAME.py``."""
    return importlib.import_module(f"{family}.{name}")
