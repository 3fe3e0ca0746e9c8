"""Everything that needs a GPU, in steps of under ten minutes each, without a network: `make gpu`.

    python3 tests/gpu/run.py [STEP ...] [--within SECONDS] [--out FOLDER]

Runs every step, or the steps that are named. A failure ends no other step; the exit status is then 1. All calls write
into one folder: a log of each command, results.json, machine.json. The first call, and the first after a change, builds
the package for this machine's GPU alone, in a folder of its own.

The Python that runs it needs torch, numpy, setuptools>=77, ninja, pytest, pytest-xdist, pytest-benchmark, hypothesis
and rich. Triton, cupy, and expecttest for torch's own suite of optimizers are used where they are installed. The CUDA
toolkit must have nvcc and compute-sanitizer.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 590.0  # seconds a command may take
PYTHON = sys.executable
SITE = ROOT / "build" / "gpu-site"
STAMP = SITE / "sources"
NEEDED = ("torch", "hypothesis", "numpy", "pip", "pytest", "pytest_benchmark", "rich", "setuptools", "xdist")
LOADED = """
import sys
from leanops import _native
state = _native.backends()["cuda"]
sys.exit(None if state.loaded else f"the CUDA library is not loaded: {state.detail}")
"""
_KERNEL = re.compile(r"__global__ void\s+(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s*)?(\w+)\(")
_FOR_A_GPU = re.compile(r"\bpytest\.mark\.gpu\b|instantiate_device_type_tests\(")


def kernels() -> list[str]:
    """Names of the CUDA library's kernels, as every family's folder in csrc/ defines them."""
    sources = [path for path in ROOT.glob("csrc/*/*") if path.suffix in (".h", ".cuh", ".cu")]
    return sorted({name for path in sources for name in _KERNEL.findall(path.read_text())})


def for_a_gpu(folder: Path) -> list[Path]:
    """Files of tests that need a GPU: by pytest's mark, or torch's tests by type of device."""
    return [path for path in sorted(folder.rglob("test_*.py")) if _FOR_A_GPU.search(path.read_text())]


class Run:
    """Runs commands one after another, each with its log and its result. A failure does not end the run."""

    def __init__(self, out: Path, within: float = float("inf")) -> None:
        self.out = out
        self.end = time.monotonic() + within
        self.failed: list[str] = []
        out.mkdir(parents=True, exist_ok=True)
        path = [str(SITE), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "LEANOPS_TIER": "ci"}

    def __call__(self, name: str, *command: str | Path) -> bool:
        log = self.out / f"{name}.log"
        line = " ".join(map(str, command))
        print(f"[{name}] {line}", flush=True)
        began = time.monotonic()
        with log.open("w") as file:
            file.write(f"$ {line}\n")
            file.flush()
            code = self._code(file.fileno(), list(map(str, command)), min(LIMIT, self.end - began))
        seconds = round(time.monotonic() - began, 1)
        last = log.read_text(errors="replace").splitlines()
        word = {0: "ok", 124: "out of time"}.get(code, f"failed ({code})")
        print(f"[{name}] {word} in {seconds:.0f} s: {last[-1]}", flush=True)
        if code:
            self.failed.append(name)
            print("\n".join(last[-40:]), flush=True)
        results = self.out / "results.json"
        known = json.loads(results.read_text()) if results.exists() else {}
        known[name] = {"result": word, "seconds": seconds, "last line": last[-1]}
        results.write_text(json.dumps(known, indent=1) + "\n")
        return code == 0

    def _code(self, log: int, command: list[str], seconds: float) -> int:
        if seconds <= 0:
            return 124
        try:  # in a process group, since pytest and the sanitizer start processes of their own
            process = subprocess.Popen(
                command, stdout=log, stderr=log, env=self.environment, cwd=self.out, preexec_fn=os.setpgrp
            )
        except OSError as error:
            os.write(log, f"{error}\n".encode())
            return 127
        try:
            return process.wait(seconds)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                return 124
            raise


def _tool(name: str) -> str:
    return shutil.which(name) or f"/usr/local/cuda/bin/{name}"


def _arch() -> str:
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}"


def _sources() -> str:
    """A digest of what the package is built from."""
    digest = hashlib.sha256((ROOT / "setup.py").read_bytes())
    for folder in ("autotune", "bench", "csrc", "optim", "pyops"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and path.suffix != ".pyc":
                digest.update(path.read_bytes())
    return digest.hexdigest()


def built(run: Run) -> bool:
    """Whether the step `build` made a package of the sources as they are, whose CUDA library this torch loads."""
    command = [PYTHON, "-c", LOADED]
    same = STAMP.exists() and STAMP.read_text() == _sources()
    return same and subprocess.run(command, env=run.environment, capture_output=True).returncode == 0


def build(run: Run) -> None:
    """A copy of the package for this machine's GPU alone, which must have the CUDA library."""
    shutil.rmtree(SITE, ignore_errors=True)
    run.environment["LEANOPS_CUDA_ARCHS"] = _arch()
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--verbose", "--target", SITE]
    if run("build", PYTHON, "-m", "pip", "install", *options, ROOT):
        STAMP.write_text(_sources())
    run("library", PYTHON, "-c", LOADED)  # the build succeeds without a library that cannot be built
    run("info", PYTHON, "-m", "leanops.bench.cli", "info")


def exhaustive(run: Run) -> None:
    """Square roots of every mantissa and many quotients, without range tests, compared with the compiler's."""
    program = run.out / "exhaustive"
    source = ROOT / "tests" / "gpu" / "exhaustive.cu"
    compile_it = [_tool("nvcc"), "-std=c++17", f"-arch=sm_{_arch()}", f"-I{ROOT / 'csrc'}", "-o", program, source]
    if run("exhaustive-build", *compile_it):
        run("exhaustive", program)
        program.unlink()


def _pytest(run: Run, name: str, *arguments: str | Path) -> None:
    workers = max(1, min(8, (os.cpu_count() or 1) // 2))  # compilers, with one thread each, take most of the time
    run.environment["OMP_NUM_THREADS"] = "2"
    try:
        common = ["-q", "-rs", "-p", "no:cacheprovider", f"--rootdir={ROOT}", "-c", ROOT / "pyproject.toml"]
        parallel = ["-n", str(workers), "--dist", "worksteal", "--durations", "10"]
        run(name, PYTHON, "-m", "pytest", *common, *parallel, *arguments)
    finally:
        del run.environment["OMP_NUM_THREADS"]


def _device(run: Run, name: str, chosen: str) -> None:
    _pytest(run, name, "-k", chosen, *sorted(ROOT.glob("tests/*/test_device.py")))


def device_library(run: Run) -> None:
    """The device suite: the CUDA library against the reference's bits."""
    _device(run, "device_library", "not triton and not nvrtc")


def device_triton(run: Run) -> None:
    """The device suite: Triton's kernels."""
    _device(run, "device_triton", "triton")


def device_nvrtc(run: Run) -> None:
    """The device suite: the kernels that NVRTC compiles at first use."""
    _device(run, "device_nvrtc", "nvrtc")


def optim(run: Run) -> None:
    """The optimizers' tests that need a GPU: what neither the device suite nor the generic suites hold."""
    tests = [path for path in for_a_gpu(ROOT / "tests") if path.name != "test_device.py" and path.parent.name != "ops"]
    _pytest(run, "optim", "-k", "cuda", *tests)


def generic(run: Run) -> None:
    """The generic suites of every operator, on the device."""
    _pytest(run, "generic", ROOT / "tests" / "ops", "--leanops-device", "cuda")


def _sanitize(run: Run, tool: str) -> None:
    # torch's caching allocator would hide what lies beyond a tensor
    run.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    try:
        options = ["--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
        for kernel in kernels():
            options += ["--kernel-name", f"kernel_substring={kernel}"]
        for family in sorted(path.parent.name for path in ROOT.glob("tests/*/agreement.py")):
            driver = [PYTHON, ROOT / "tests" / "gpu" / "driver.py", family]
            run(f"{tool}-{family}", _tool("compute-sanitizer"), *options, *driver)
    finally:
        del run.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"]


def memcheck(run: Run) -> None:
    """compute-sanitizer memcheck over every CUDA kernel."""
    _sanitize(run, "memcheck")


def racecheck(run: Run) -> None:
    """compute-sanitizer racecheck over every CUDA kernel."""
    _sanitize(run, "racecheck")


def bench(run: Run) -> None:
    """The benchmarks, on the device."""
    cli = [PYTHON, "-m", "leanops.bench.cli", "bench", "--device", "cuda", "--quick"]
    run("bench", *cli, "--json", run.out / "bench.json", "--html", run.out / "bench.html")


STEPS: dict[str, Callable[[Run], None]] = {
    step.__name__: step
    for step in (
        *(build, exhaustive, device_library, optim, memcheck, device_triton),
        *(device_nvrtc, generic, racecheck, bench),
    )
}


def _output_of(*command: str) -> str:
    """What a program prints; empty where it is not installed."""
    found = shutil.which(command[0])
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() if found else ""


def describe() -> dict[str, str]:
    """Machine and versions, for the results folder."""
    import torch

    facts = {"python": sys.version.split()[0], "torch": torch.__version__, "cuda": str(torch.version.cuda)}
    facts["device"] = torch.cuda.get_device_name()
    facts["driver"] = _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown"
    facts["commit"] = _output_of("git", "rev-parse", "HEAD") or "unknown"
    for package in ("triton", "cupy", "numpy"):
        try:
            facts[package] = __import__(package).__version__
        except ImportError:
            facts[package] = "not installed"
    return facts


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=f"steps: {', '.join(STEPS)}"
    )
    parser.add_argument("steps", nargs="*", metavar="STEP", help="only these steps")
    parser.add_argument(
        "--within", type=float, default=float("inf"), metavar="SECONDS", help="for all of them together"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-results")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.steps if name not in STEPS]:
        parser.error(f"no step {', '.join(unknown)}; there are {', '.join(STEPS)}")
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        print(f"run.py: {PYTHON} has no {', '.join(missing)}", file=sys.stderr)
        return 2
    import torch

    if not torch.cuda.is_available():
        print(f"run.py: no CUDA device is visible to torch {torch.__version__}", file=sys.stderr)
        return 2
    run = Run(options.out.resolve(), options.within)
    (run.out / "machine.json").write_text(json.dumps(describe(), indent=1) + "\n")
    steps = options.steps or list(STEPS)
    if "build" not in steps and not built(run):
        steps = ["build", *steps]
    for name in steps:
        STEPS[name](run)
    print(f"results: {run.out}")
    if run.failed:
        print(f"failed: {', '.join(run.failed)}", file=sys.stderr)
    return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main())
