"""Rules that every file keeps: absolute imports, named devices, 64-bit indices."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from families import FAMILIES, ROOT

from leanops import info

PACKAGES = {"autotune": "leanops.autotune", "pyops": "leanops", "optim": "leanops.optim", "bench": "leanops.bench"}


def imports(path: Path) -> list[tuple[str, int]]:
    """(module, leading dots) of every import."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, 0) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.module or "", node.level))
    return found


def test_imports_are_absolute_and_never_of_a_top_level_folder():
    for path in [p for folder in (*PACKAGES, "tests", "docs") for p in (ROOT / folder).rglob("*.py")]:
        for module, dots in imports(path):
            assert dots == 0, f"{path}: relative import of {module}"
            top, *rest = module.split(".")
            assert top not in PACKAGES, f"{path}: imports {module}; write {'.'.join([PACKAGES[top], *rest])}"


def test_no_tensor_is_made_on_the_default_device():
    """A user's default device (``torch.set_default_device``) says nothing of where parameters lie."""
    made = {"tensor", "as_tensor", "asarray", "scalar_tensor", "zeros", "ones", "empty", "full", "arange", "linspace"}
    made |= {"rand", "randn", "randint", "randperm", "eye", "empty_strided"}
    seen = 0
    for path in [p for layer in ("pyops", "optim") for p in (ROOT / layer).rglob("*.py") if p.name != "cases.py"]:
        tree = ast.parse(path.read_text())
        asked = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr == "device"}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"torch.{name}" for name in made}:
                seen += 1
                named = any(k.arg == "device" for k in node.keywords) or id(node) in asked
                assert named, f"{path}:{node.lineno}: name the device: {ast.unparse(node)}"
    assert seen > 20


def test_triton_program_ids_are_64_bit_before_any_product():
    kernels = list((ROOT / "pyops").rglob("triton*.py"))
    assert len(kernels) > len(FAMILIES)
    for path in kernels:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if "program_id(" in line:
                assert ".to(tl.int64)" in line, f"{path}:{number}: {line.strip()}"


def test_cuda_block_products_are_64_bit():
    for path in [*(ROOT / "csrc").rglob("*.cuh"), *(ROOT / "csrc").rglob("*.cu")]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if re.search(r"blockIdx\.\w\s*\*|\*\s*blockIdx", line):
                assert re.search(r"\(?(u?int64_t|long long|u64|i64|uint64|int64)\)?\s*\(?\s*blockIdx", line), (
                    f"{path}:{number}: {line.strip()}"
                )


def test_no_folder_of_tests_passes_for_an_optional_package():
    """tests/ is on the path, where a folder is a package: importlib.util.find_spec would find it."""
    folders = {p.name for p in (ROOT / "tests").iterdir() if p.is_dir()}
    assert {"ops", "gpu"} <= folders
    assert folders.isdisjoint(info._OPTIONAL)


def test_setup_py_is_short():
    assert len((ROOT / "setup.py").read_text().splitlines()) < 150
