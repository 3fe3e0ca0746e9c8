"""tests/gpu/run.py without a GPU: a failure is reported and ends nothing, and the steps run every test for a GPU."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import families
import pytest
import torch
from _pytest.mark.expression import Expression
from aot import aot, sass
from gpu import run as gpu

PYTHON = sys.executable
FAMILIES = families.having("agreement.py")


class Recorded(gpu.Run):
    """Keeps the commands instead of running them."""

    def __init__(self, out: Path) -> None:
        super().__init__(out)
        self.commands: dict[str, list[str]] = {}

    def __call__(self, name: str, *command: str | Path) -> bool:
        self.commands[name] = [str(part) for part in command]
        return False


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Every step's commands, by name."""
    monkeypatch.setattr(gpu, "SITE", tmp_path / "site")
    monkeypatch.setattr(gpu, "_arch", lambda: "90")
    run = Recorded(tmp_path)
    for step in gpu.STEPS.values():
        step(run)
    return run.commands


@pytest.fixture
def machine(monkeypatch):
    """As if there were a GPU, and the package built for it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(gpu, "built", lambda run: True)


def test_a_failure_is_reported_at_the_end_and_ends_nothing(tmp_path, machine, monkeypatch, capfd):
    steps = {
        "broken": lambda run: run("broken", PYTHON, "-c", "print('why'); raise SystemExit(3)"),
        "absent": lambda run: run("absent", tmp_path / "nowhere"),
        "sound": lambda run: run("sound", PYTHON, "-c", "print('1 passed')"),
    }
    monkeypatch.setattr(gpu, "STEPS", steps)
    assert gpu.main(["--out", str(tmp_path)]) == 1
    assert "failed: broken, absent" in capfd.readouterr().err
    assert gpu.main(["--out", str(tmp_path), "sound"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())  # of both calls
    assert {name: (entry["result"], entry["last line"]) for name, entry in results.items()} == {
        "broken": ("failed (3)", "why"),
        "absent": ("failed (127)", f"[Errno 2] No such file or directory: '{tmp_path / 'nowhere'}'"),
        "sound": ("ok", "1 passed"),
    }


def test_a_command_out_of_time_ends_with_the_processes_it_started(tmp_path):
    child = f"import subprocess; print('began', flush=True); subprocess.run(['sleep', '60.{os.getpid()}'])"
    run = gpu.Run(tmp_path, within=3)
    assert not run("long", PYTHON, "-c", child)
    assert not run("never", PYTHON, "-c", "print(1)")
    assert run.failed == ["long", "never"]
    results = json.loads((tmp_path / "results.json").read_text())
    assert {entry["result"] for entry in results.values()} == {"out of time"}
    assert results["long"]["last line"] == "began"
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert f"sleep 60.{os.getpid()}" not in running


def test_a_build_without_the_cuda_library_fails(commands, tmp_path, monkeypatch):
    monkeypatch.setenv("LEANOPS_DISABLE", "cuda")
    run = gpu.Run(tmp_path / "out")
    assert not run("library", *commands["library"])
    assert "the CUDA library is not loaded" in (tmp_path / "out" / "library.log").read_text()


def test_a_change_of_the_sources_is_built_again(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "STAMP", tmp_path / "sources")
    monkeypatch.setattr(gpu, "LOADED", "")
    run = gpu.Run(tmp_path)
    assert not gpu.built(run)
    (tmp_path / "sources").write_text(gpu._sources())
    assert gpu.built(run)
    monkeypatch.setattr(gpu, "LOADED", "raise SystemExit(1)")
    assert not gpu.built(run)
    (tmp_path / "sources").write_text("others")
    monkeypatch.setattr(gpu, "LOADED", "")
    assert not gpu.built(run)


def test_packages_on_the_path_stay_there(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "carried"))
    run = gpu.Run(tmp_path)
    assert run("path", PYTHON, "-c", "import sys; print(sys.path)")
    assert str(tmp_path / "carried") in (tmp_path / "path.log").read_text()


def test_a_machine_without_git_is_described(machine, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu.describe()["commit"] == "unknown"


def test_packages_that_are_missing_are_named(machine, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "NEEDED", ("torch", "no_such_package", "nor_this"))
    assert gpu.main(["build"]) == 2
    assert "no_such_package, nor_this" in capsys.readouterr().err


def test_every_test_for_a_gpu_is_in_a_step(commands):
    tests = gpu.ROOT / "tests"
    marked = [f for f in gpu.for_a_gpu(tests) if "example_family" not in f.parts]  # which runs in a copy
    ran = {Path(part) for command in commands.values() for part in command if part.startswith(str(tests))}
    assert len(marked) >= 6
    assert [f for f in marked if not {f, *f.parents} & ran] == []


def test_each_backend_has_a_step_of_the_device_suite(commands):
    """Together the three run every test once."""

    parts = [commands[f"device_{name}"] for name in ("library", "triton", "nvrtc")]
    chosen = [Expression.compile(part[part.index("-k") + 1]) for part in parts]
    suites = [part for part in parts[0] if part.endswith(".py")]
    command = [PYTHON, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", *suites]
    listed = subprocess.run(command, capture_output=True, text=True, cwd=gpu.ROOT).stdout
    tests = [line.split("::")[1] for line in listed.splitlines() if "::" in line]
    assert len(tests) > 500
    ran = [sum(choice.evaluate(lambda word, test=test: word in test) for choice in chosen) for test in tests]
    assert [test for test, times in zip(tests, ran, strict=True) if times != 1] == []


def symbols_of(family: str) -> set[str]:
    """The kernels of the CUDA library as built."""
    if reason := aot.no_library():
        pytest.skip(reason)
    names = re.findall(r"Function (\S+):\s+REG:", sass.cuobjdump(aot.LIBRARY, "-res-usage"))
    found = {name for name in names if not family or f"{len(family)}{family}" in name}
    assert found
    return found


def test_the_sanitizers_watch_every_kernel_of_the_library(commands):
    symbols = symbols_of("")
    sanitizers = [commands[f"{tool}-{family}"] for tool in ("memcheck", "racecheck") for family in FAMILIES]
    for command in sanitizers:
        filters = [part.removeprefix("kernel_substring=") for part in command if part.startswith("kernel_substring=")]
        assert [s for s in symbols if not any(f in s for f in filters)] == []
        assert [f for f in filters if not any(f in s for s in symbols)] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_the_driver_launches_every_kernel(emulator, one_thread, family):
    agreement = families.module(family, "agreement")
    unused = getattr(agreement, "UNUSED_KERNELS", None)
    symbols = {s for s in symbols_of(family) if not (unused and re.search(unused, s))}
    agreement.every_kernel(importlib.import_module(f"leanops.{family}.nvrtc"), "cpu")
    assert len(set(emulator.launches)) == len(symbols), sorted(set(emulator.launches))
