"""A new family adds files in folders of its own name, and every shared suite finds it.

The family is tests/example_family: one operator with a C++, a CUDA and a Triton kernel. The copy that gets it has no
other family's kernels and tests, so that little is compiled.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import ModuleType

import pytest
from families import FAMILIES, ROOT, TESTS
from native.build import toolchain

from leanops import _native

EXAMPLE = TESTS / "example_family"
OPTIMIZERS = ("optim", "selection", "integrations")
PYTHON = sys.executable


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository with the family ``twice``."""
    folder: Path = tmp_path_factory.mktemp("copy")
    absent = shutil.ignore_patterns("__pycache__", "example_family", *OPTIMIZERS, "bench", *FAMILIES)
    for name in ("csrc", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=absent)
    shutil.copytree(ROOT / "pyops", folder / "pyops", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for floor in ("csrc", "pyops", "tests"):
        shutil.copytree(EXAMPLE / floor, folder / floor, dirs_exist_ok=True)
    assert {path: path.read_bytes() for path in before} == before, "the family writes over a shared file"
    package = folder / "site" / "leanops"  # as the build maps folders
    package.mkdir(parents=True)
    for path in (*(folder / "pyops").iterdir(), ROOT / "optim", ROOT / "autotune", ROOT / "bench"):
        (package / path.name).symlink_to(path)
    (package / "lib").symlink_to(_native.FOLDER)
    return folder


def run(copy: Path, *command: str | Path) -> str:
    path = os.pathsep.join([str(copy / "site"), str(copy / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment["PYTHONPATH"] = path
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.ci
def test_every_suite_takes_the_family(copy):
    suites = [f"tests/{name}" for name in ("twice", "ops", "aot", "interpreter")]
    results = copy / "results.xml"
    run(copy, PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "twice", f"--junitxml={results}", *suites)
    cases = [case for case in ElementTree.parse(results).iter("testcase") if case.find("skipped") is None]
    ran = {(case.get("classname", "").split(".")[1], case.get("name", "")) for case in cases}
    needed = {("twice", "test_every_set_of_kernels_gives_the_bits_of_the_definition")}
    needed |= {("twice", "test_the_core_has_the_bits_of_the_reference")}
    needed |= {("aot", "test_every_kernel_of_a_family_is_compiled_ahead_of_time[twice]")}
    needed |= {("interpreter", "test_every_family_with_triton_kernels_is_interpreted[twice]")}
    if importlib.util.find_spec("triton"):
        needed |= {("twice", "test_the_kernel_has_the_bits_of_the_reference"), ("twice", "test_triton_kernels_fit")}
    assert needed <= ran
    assert len([name for suite, name in ran if suite == "ops"]) >= 10
    assert len([name for _, name in ran if name.startswith("test_nvrtc_compiles")]) in (0, 3)  # 0: no NVRTC here


def test_the_sanitizers_run_its_core(copy):
    code = "from native.build import build_driver; print(build_driver('undefined'))"
    driver = run(copy, PYTHON, "-c", code).split()[-1]
    assert run(copy, driver, "avx512_emulated").endswith(": 1 runs, 0 with different bits\n")


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("run_of_the_copy", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_gpu_machine_runs_and_watches_its_kernels(copy, tmp_path, monkeypatch):
    gpu = load(copy / "tests" / "gpu" / "run.py")
    monkeypatch.setattr(gpu, "_arch", lambda: "90")
    commands: dict[str, list[str]] = {}

    class Recorded(gpu.Run):  # type: ignore[misc, name-defined]
        def __call__(self, name: str, *command: str | Path) -> bool:
            commands[name] = [str(part) for part in command]
            return False

    for name in ("device_library", "device_triton", "device_nvrtc", "memcheck", "racecheck"):
        gpu.STEPS[name](Recorded(tmp_path))
    for name in ("device_library", "device_triton", "device_nvrtc"):
        assert str(copy / "tests" / "twice" / "test_device.py") in commands[name]
    for tool in ("memcheck", "racecheck"):
        assert "kernel_substring=twice_kernel" in commands[f"{tool}-twice"]
        assert commands[f"{tool}-twice"][-1] == "twice"


def test_nvcc_takes_its_kernel(copy, tmp_path):
    try:
        nvcc = toolchain.find_nvcc()
    except toolchain.Unavailable as error:
        pytest.skip(f"{error}; install the CUDA toolkit")
    source = tmp_path / "twice.cu"
    source.write_text('#include "twice/launch_cuda.h"\n')
    command = [nvcc, "-std=c++17", "-arch=sm_90", "-I", copy / "csrc", "-cubin", "-o", tmp_path / "twice.cubin", source]
    run(copy, *command)
    assert b"twice_kernel" in (tmp_path / "twice.cubin").read_bytes()
