"""The build: what a wheel holds, and that a missing compiler costs a library, not the package."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from building import checkout, program

ROOT = Path(__file__).parent.parent


def wheel(folder: Path, **environment: str) -> Path:
    """A wheel built from a copy of the sources with changed environment variables."""
    source = checkout(folder / "the sources").folder
    shutil.copy(ROOT / "MANIFEST.in", source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", folder, source]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.whl"))


def ask(installed: Path, code: str, **environment: str) -> str:
    env = os.environ | {"PYTHONPATH": str(installed)} | environment
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=installed, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


STATE = (
    "import json, leanops as lo; from leanops import _native; "
    "state = [lo.__file__, _native.backends()['cpu'].detail, _native.build_report(), lo.zo_noise(2, 1).tolist()]; "
    "print(json.dumps(state))"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A wheel made where there is no nvcc, where every path has a space and the compiler a launcher and a flag."""
    folder = tmp_path_factory.mktemp("a wheel")
    temporary = folder / "temporary files"
    temporary.mkdir()
    launcher = program(folder / "a launcher", '#!/bin/sh\nexec "$@"\n')
    compiler = next(filter(None, map(shutil.which, ("g++", "clang++"))))
    cxx = shlex.join([str(launcher), compiler, "-DA_FLAG"])
    return wheel(folder, CUDA_HOME="/nowhere", CXX=cxx, TMPDIR=str(temporary))


def test_one_wheel_serves_every_python(built):
    assert "-py3-none-" in built.name
    names = zipfile.ZipFile(built).namelist()
    assert "leanops/lib/libleanops_cpu.so" in names
    assert "leanops/lib/csrc/zo/zo.cuh" in names
    assert "leanops/py.typed" in names
    tops = {name.split("/")[0] for name in names}
    assert all(top == "leanops" or top.startswith("leanops-") for top in tops)


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm, from binutils")
def test_the_library_has_no_python_symbol(built, tmp_path):
    library = zipfile.ZipFile(built).extract("leanops/lib/libleanops_cpu.so", tmp_path)
    symbols = subprocess.run(["nm", "-D", library], capture_output=True, text=True, check=True).stdout
    names = [line.split()[-1] for line in symbols.splitlines()]
    assert names
    assert not [n for n in names if n.startswith(("Py", "_Py"))]


def test_an_installed_wheel_works_and_says_why_it_has_no_cuda_library(built, tmp_path):
    zipfile.ZipFile(built).extractall(tmp_path)
    file, isa, report, _ = json.loads(ask(tmp_path, STATE))
    assert Path(file).is_relative_to(tmp_path)
    assert isa in ("baseline", "avx2", "avx512")
    assert report["cpu"] == {"built": True}
    assert report["cuda"] == {"built": False, "reason": "no nvcc found (looked at CUDA_HOME=/nowhere)"}


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "mmx"])
def test_the_environment_forces_an_instruction_set(built, tmp_path, isa):
    zipfile.ZipFile(built).extractall(tmp_path)
    flags = Path("/proc/cpuinfo").read_text()
    if isa in ("avx2", "avx512") and ("avx512bw" if isa == "avx512" else "avx2") not in flags:
        pytest.skip(f"this processor has no {isa}")
    code = "from leanops import _native; print(_native.cpu_isa())"
    if isa == "mmx":
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONPATH": str(tmp_path), "LEANOPS_CPU_ISA": isa},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode != 0
        assert "LEANOPS_CPU_ISA must be baseline, avx2 or avx512, got 'mmx'" in done.stderr
    else:
        assert ask(tmp_path, code, LEANOPS_CPU_ISA=isa) == isa


def test_without_a_compiler_the_package_works_and_says_why(tmp_path):
    built = wheel(tmp_path / "wheel", CXX="no-such-compiler", LEANOPS_CUDA_ARCHS="")
    zipfile.ZipFile(built).extractall(tmp_path / "site")
    file, detail, report, values = json.loads(ask(tmp_path / "site", STATE))
    assert Path(file).is_relative_to(tmp_path)
    reason = "no C++ compiler found (looked at CXX=no-such-compiler); install g++ or clang++, or set CXX"
    assert detail == reason
    assert report == {
        "cpu": {"built": False, "reason": reason},
        "cuda": {"built": False, "reason": "LEANOPS_CUDA_ARCHS is empty"},
    }
    import leanops as lo

    assert values == lo.zo_noise(2, 1).tolist()


def test_macros_of_torch_are_those_of_the_oldest_one():
    """TORCH_TARGET_VERSION hides torch's newer functions, but none of its newer macros and headers."""
    of_2_10 = {"STABLE_TORCH_LIBRARY_IMPL", "STD_CUDA_CHECK", "STD_TORCH_CHECK", "TORCH_ABI_VERSION", "TORCH_BOX"}
    of_2_10 |= {"TORCH_ERROR_CODE_CHECK"}
    sources = {path: path.read_text() for path in (ROOT / "csrc").rglob("*.*")}
    names = r"\b(?:AOTI|C10|STABLE|STD|TORCH)_[A-Z0-9_]+\b"
    assert {name for text in sources.values() for name in re.findall(names, text)} == of_2_10
    for path, text in sources.items():  # which 2.11 includes in none of its other headers
        known = text + sources[ROOT / "csrc/common/torch_cuda.h"] * ('"../common/torch_cuda.h"' in text)
        assert "STD_CUDA_CHECK" not in text or "#include <torch/csrc/stable/macros.h>" in known, path
