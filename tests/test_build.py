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


# compiles without optimization, in a third of the time
LAUNCHER = """#!/bin/sh
for word do
    shift
    test "$word" = -O3 && word=-O0
    set -- "$@" "$word"
done
exec "$@"
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A wheel made where there is no nvcc, where every path has a space and the compiler a launcher and a flag."""
    folder = tmp_path_factory.mktemp("a wheel")
    temporary = folder / "temporary files"
    temporary.mkdir()
    launcher = program(folder / "a launcher", LAUNCHER)
    compiler = next(filter(None, map(shutil.which, ("g++", "clang++"))))
    cxx = shlex.join([str(launcher), compiler, "-DA_FLAG"])
    return wheel(folder, CUDA_HOME="/nowhere", CXX=cxx, TMPDIR=str(temporary))


def test_one_wheel_serves_every_python(built):
    assert "-py3-none-" in built.name
    names = zipfile.ZipFile(built).namelist()
    assert "leanops/lib/libleanops_cpu.so" in names
    assert "leanops/lib/csrc/zo/zo.cuh" in names
    assert "leanops/py.typed" in names
    assert "leanops/integrations/transformers.py" in names
    assert not any(name.startswith("leanops/optim/integrations") for name in names)
    tops = {name.split("/")[0] for name in names}
    assert all(top in ("leanops", "leanops_command") or top.startswith("leanops-") for top in tops)
    assert "leanops_command/__init__.py" in names


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


@pytest.fixture(scope="module")
def uncompiled(tmp_path_factory):
    """An installation that was made without a compiler."""
    folder = tmp_path_factory.mktemp("uncompiled")
    built = wheel(folder, CXX="no-such-compiler", LEANOPS_CUDA_ARCHS="")
    zipfile.ZipFile(built).extractall(folder / "site")
    return folder / "site"


NO_COMPILER = "no C++ compiler found (looked at CXX=no-such-compiler); install g++ or clang++, or set CXX"


def test_without_a_compiler_the_package_works_and_says_why(uncompiled):
    file, detail, report, values = json.loads(ask(uncompiled, STATE))
    assert Path(file).is_relative_to(uncompiled)
    assert detail == NO_COMPILER
    assert report == {
        "cpu": {"built": False, "reason": NO_COMPILER},
        "cuda": {"built": False, "reason": "LEANOPS_CUDA_ARCHS is empty"},
    }
    import leanops as lo

    assert values == lo.zo_noise(2, 1).tolist()


# runs code in a module named user, and prints each warning's text and line
WARNED = """
import json, sys, types, warnings, torch
warnings.simplefilter("always")
seen = []
with warnings.catch_warnings(record=True) as seen:
    import leanops as lo
    assert not seen, seen
    exec(compile(CODE, "user.py", "exec"), {"__name__": "user", "lo": lo, "torch": torch})
warned = [w for w in seen if "leanops" in str(w.message)]
print(json.dumps([[w.category.__name__, str(w.message), w.filename, w.lineno] for w in warned]))
"""


def warned(installed: Path, code: str, before: str = "", **environment: str) -> list[list[object]]:
    seen: list[list[object]] = json.loads(ask(installed, f"CODE = {code!r}\n{before}\n{WARNED}", **environment))
    return seen


def test_the_first_use_of_a_cpu_that_the_reference_serves_warns_once(uncompiled):
    seen = warned(uncompiled, "x = 1\nlo.zo_noise(3, 1)\nlo.zo_noise(3, 1)\nlo.zo_axpy_([torch.ones(3)], 1, 1.0)")
    message = (
        "leanops: the pure torch reference, tens to hundreds of times slower than a kernel, serves the CPU, because "
        f"the compiled library is absent: {NO_COMPILER}. After that, install leanops again. `leanops info` shows what "
        "serves each operator; LEANOPS_DISABLE=cpu silences this."
    )
    assert seen == [["UserWarning", message, "user.py", 2]]


def test_an_optimizer_s_first_step_warns_at_the_line_of_its_user(uncompiled):
    code = "w = torch.nn.Parameter(torch.ones(3))\nw.grad = torch.ones(3)\nlo.optim.SM3([w]).step()"
    ((_, _, file, line),) = warned(uncompiled, code)
    assert (file, line) == ("user.py", 3)


def test_who_disables_the_library_is_not_warned(uncompiled):
    assert warned(uncompiled, "lo.zo_noise(3, 1)", LEANOPS_DISABLE="cpu") == []


def test_a_compiled_graph_warns_when_it_runs_and_does_not_break(uncompiled):
    code = """
def step(w, x):
    lo.zo_axpy_([w], 1, 0.5)
    return lo.zo_linear(x, w, seed=3, scale=0.1)
compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
w, x = torch.ones(4, 8), torch.ones(2, 8)
with torch.no_grad():
    assert torch.equal(compiled(w.clone(), x)[0], step(w, x)[0])
"""
    seen = warned(uncompiled, code)
    assert [message.split(",")[0] for _, message, _, _ in seen] == ["leanops: the pure torch reference"]


# a torch with CUDA, without the packages that would serve it; the call reaches the reference as a GPU's would
NO_BACKEND = """
import importlib.util, torch
torch.version.cuda = "13.0"
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in ("triton", "cupy") else find(name, *rest)
"""
ON_A_GPU = """
from leanops import _registry
keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
for _ in range(2):
    _registry.spec("zo_noise_").op._handle.redispatch_boxed(keys, torch.empty(3), torch.tensor(1), 0, 0, "gaussian")
"""


def test_the_first_use_of_a_gpu_that_the_reference_serves_warns_once(uncompiled):
    ((_, message, _, _),) = warned(uncompiled, ON_A_GPU, NO_BACKEND)
    assert message == (
        "leanops: the pure torch reference, tens to hundreds of times slower than a kernel, serves the GPU, because "
        "its backends are absent: cuda: LEANOPS_CUDA_ARCHS is empty; triton: triton is not installed; nvrtc: cupy is "
        "not installed. The quickest remedy is to install leanops[triton]. `leanops info` shows what serves each "
        "operator; LEANOPS_DISABLE=cuda,triton,nvrtc silences this."
    )
    assert warned(uncompiled, ON_A_GPU, NO_BACKEND, LEANOPS_DISABLE="triton") == []
    triton = NO_BACKEND.replace('("triton", "cupy")', '"cupy"').replace("name in", "name ==")
    seen = warned(
        uncompiled, "from leanops import _registry; assert not _registry.unserved", triton, LEANOPS_DISABLE="cpu"
    )
    assert seen == []


def test_info_shows_the_reasons_of_the_build(uncompiled):
    shown = json.loads(ask(uncompiled, "import json; from leanops import info; print(json.dumps(info.collect()))"))
    for name in ("cpu", "cuda"):
        if name == "cpu" or "built without CUDA" not in shown["backends"][name]["detail"]:
            assert shown["backends"][name]["detail"] == shown["build"][name]["reason"]
        assert shown["backends"][name]["state"] == "absent"
    assert {by_device["cpu"] for by_device in shown["operators"].values()} <= {
        "reference",
        "composite of leanops operators",
    }


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
