"""The four import rules of the house. A broken rule names the file and the line to change.

No code tests for another family's class by ``isinstance``: by rule 2 it cannot import the class.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from families import FAMILIES, ROOT

import leanops

FOLDERS = ("autotune", "pyops", "optim", "bench")
FLOORS = (
    "autotune",
    "pyops/common",  # with the skeleton: _opspec.py, _registry.py and _native.py
    "a family in pyops",
    "pyops",  # __init__.py and info.py, which show all families
    "optim/common",
    "a family in optim",  # selection/, fused_backward.py and reset.py are families of their own
    "optim",  # __init__.py
    "optim/integrations",  # the package leanops.integrations
    "bench",
)
SKELETON = {"_opspec.py", "_registry.py", "_native.py"}


class Import(NamedTuple):
    """``from module import name``, or ``import module`` with no name."""

    file: Path
    line: int
    module: str
    name: str | None

    def __str__(self) -> str:
        text = f"import {self.module}" if self.name is None else f"from {self.module} import {self.name}"
        return f"{self.file}:{self.line}: {text}"


def imports_of(path: Path, root: Path = ROOT) -> Iterator[Import]:
    file = path.relative_to(root)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, node.lineno, alias.name, None)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield Import(file, node.lineno, node.module or "", alias.name)


def file_of(found: Import, root: Path = ROOT) -> Path | None:
    """The file of the repository that an import reads, None for other packages."""
    parts = found.module.split(".")
    if parts[0] != "leanops":
        return None
    folders = parts[1:] if len(parts) > 1 and parts[1] in FOLDERS else ["pyops", *parts[1:]]
    if folders[:2] == ["pyops", "integrations"]:
        folders[0] = "optim"
    options = [[*folders, found.name]] if found.name else []
    if folders == ["pyops"] and found.name in FOLDERS:  # from leanops import optim
        options.insert(0, [found.name])
    for option in (*options, folders):
        base = root.joinpath(*option)
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.exists():
                return path.relative_to(root)
    return None


def floor_of(file: Path) -> str:
    top, *rest = file.parts
    if top in ("autotune", "bench"):
        return top
    room = rest[0]
    if top == "pyops":
        if room == "common" or room in SKELETON:
            return "pyops/common"
        return "a family in pyops" if len(rest) > 1 else "pyops"
    if room in ("common", "integrations"):
        return f"optim/{room}"
    return "optim" if room == "__init__.py" else "a family in optim"


def family_of(file: Path) -> str | None:
    """The family, or the room beside the families, that a file belongs to."""
    top, room, *_ = file.parts
    floor = floor_of(file)
    if floor in ("a family in pyops", "a family in optim"):
        return Path(room).stem
    return Path(file.parts[1]).name if top == "csrc" and room in FAMILIES else None


@cache
def internal_imports(root: Path = ROOT) -> list[tuple[Import, Path]]:
    found = [
        (i, file_of(i, root)) for top in FOLDERS for path in (root / top).rglob("*.py") for i in imports_of(path, root)
    ]
    return [(i, target) for i, target in found if target is not None]


def upward(root: Path = ROOT) -> list[str]:
    """Rule 1."""
    return [
        f"{i}: {floor_of(i.file)} must not import from {floor_of(target)}, which is above it"
        for i, target in internal_imports(root)
        if FLOORS.index(floor_of(target)) > FLOORS.index(floor_of(i.file))
    ]


def between_families(root: Path = ROOT) -> list[str]:
    """Rule 2."""
    broken = []
    for i, target in internal_imports(root):
        mine, theirs = family_of(i.file), family_of(target)
        if mine is not None and theirs in FAMILIES and theirs != mine:
            broken.append(f"{i}: {mine} must not import the family {theirs}; move what both need to common")
        if floor_of(i.file) in ("pyops/common", "optim/common") and theirs in FAMILIES:
            broken.append(f"{i}: common must not import the family {theirs}")
    for path in (p for p in (root / "csrc").rglob("*") if p.suffix in (".h", ".cuh", ".cpp", ".cu")):
        mine = path.relative_to(root / "csrc").parts[0]
        for number, line in enumerate(path.read_text().splitlines(), 1):
            include = re.match(r'\s*#include "(?:\.\./)?(\w+)/', line)
            if include and include[1] in FAMILIES and mine != include[1]:
                broken.append(
                    f"{path.relative_to(root)}:{number}: {line.strip()}: {mine} must not include {include[1]}"
                )
    return broken


def private_names(root: Path = ROOT) -> list[str]:
    """Rule 3."""
    broken = []
    for i, target in internal_imports(root):
        if not floor_of(i.file).startswith(("optim", "a family in optim")) or floor_of(target) != "a family in pyops":
            continue
        family = target.parts[1]
        if i.module != f"leanops.{family}" or i.name not in getattr(leanops, family).__all__:
            broken.append(f"{i}: optim takes from leanops.{family} only what its __all__ names")
    return broken


def inputs_of_tests(root: Path = ROOT) -> list[str]:
    """Rule 4. An OpSpec names its cases, and ``late`` imports them at their first use."""
    return [
        f"{i}: only tests and bench import {target}"
        for i, target in internal_imports(root)
        if target.stem == "cases" and floor_of(i.file) != "bench"
    ]


RULES = {rule.__name__: rule for rule in (upward, between_families, private_names, inputs_of_tests)}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_rule_is_kept(rule):
    assert not (broken := rule()), "\n".join(broken)


def test_every_internal_import_is_found():
    """A resolver that finds nothing would keep every rule."""
    found = internal_imports()
    assert len(found) > 200
    assert {floor_of(target) for _, target in found} | {"optim"} >= set(FLOORS)


@pytest.mark.parametrize(
    ("file", "line", "rule"),
    [
        ("pyops/common/bad.py", "from leanops.zo import columns_of", "upward"),
        ("pyops/zo/bad.py", "from leanops.optim.zo.mezo import MeZO", "upward"),
        ("autotune/bad.py", "import leanops.common.checks", "upward"),
        ("pyops/sm3/bad.py", "from leanops.zo.reference import noise", "between_families"),
        ("optim/sm3/bad.py", "from leanops.optim.zo.log import ZoLog", "between_families"),
        ("optim/selection/bad.py", "from leanops.optim.sm3 import SM3", "between_families"),
        ("optim/sm3/bad.py", "import leanops.integrations.transformers", "upward"),
        ("optim/zo/bad.py", "from leanops.zo.reference import noise", "private_names"),
        ("pyops/zo/bad.py", "from leanops.zo import cases", "inputs_of_tests"),
        ("pyops/sm3/bad.py", "from leanops.sm3.cases import STEP", "inputs_of_tests"),
        ("optim/sm3/bad.py", "import leanops.sm3.cases", "inputs_of_tests"),
        ("csrc/sm3/bad.h", '#include "zo/noise.h"', "between_families"),
    ],
)
def test_a_broken_rule_names_the_line(file, line, rule, tmp_path):
    for top in (*FOLDERS, "csrc"):
        (tmp_path / top).symlink_to(ROOT / top) if top != file.split("/")[0] else None
    broken = tmp_path / file
    source = ROOT / file.split("/")[0]
    for path in source.rglob("*.py"):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text("")
    broken.parent.mkdir(parents=True, exist_ok=True)
    broken.write_text(f"\n{line}\n")
    found = RULES[rule](tmp_path)
    assert any(f"{file}:2: " in text for text in found), found
