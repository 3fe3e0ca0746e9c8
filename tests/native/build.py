"""Builds the torch-free cores with the flags of ``setup.py``: as a Python module, or as a driver."""

from __future__ import annotations

import ast
import importlib.util
import os
import platform
import shlex
import subprocess
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


def setup_constants() -> dict[str, object]:
    """The literal constants of setup.py, read without running it."""
    constants: dict[str, object] = {}
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                constants[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                continue
    return constants


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def isa_flags() -> dict[str, str]:
    flags = setup_constants()["ISA_FLAGS"]
    assert isinstance(flags, dict)
    return flags if platform.machine() in ("x86_64", "AMD64") else {"baseline": ""}


def compile_cores(folder: Path, main: str, extra: Sequence[str] = ()) -> list[Path]:
    """Objects of every core, once per instruction set, of ``csrc/common`` and of ``main``."""
    base = [compiler(), *shlex.split(str(setup_constants()["CXX_FLAGS"])), "-Icsrc", *extra]
    jobs = [([*base], source, source.stem) for source in (ROOT / "csrc/common").glob("*.cpp")]
    jobs.append(([*base], ROOT / main, Path(main).stem))
    for source in (ROOT / "csrc").glob("*/*_kernels.cpp"):
        for isa, flags in isa_flags().items():
            jobs.append(([*base, *flags.split(), f"-DLEANOPS_ISA={isa}"], source, f"{source.stem}.{isa}"))

    def run(job: tuple[list[str], Path, str]) -> Path:
        command, source, name = job
        target = folder / f"{name}.o"
        done = subprocess.run(
            [*command, "-c", str(source), "-o", str(target)], cwd=ROOT, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{source} does not compile:\n{done.stderr}")
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(run, jobs))


def link(objects: Sequence[Path], target: Path, extra: Sequence[str] = ()) -> Path:
    subprocess.run([compiler(), *map(str, objects), "-o", str(target), *extra], check=True)
    return target


def build_module(folder: Path) -> ModuleType:
    import pybind11

    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    objects = compile_cores(folder, "csrc/testing/module.cpp", includes)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    target = link(objects, folder / f"leanops_native{suffix}", ["-shared", "-pthread"])
    spec = importlib.util.spec_from_file_location("leanops_native", target)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_driver(folder: Path, sanitizers: str) -> Path:
    flags = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1"]
    return link(compile_cores(folder, "csrc/testing/driver.cpp", flags), folder / "driver", [*flags, "-pthread"])
