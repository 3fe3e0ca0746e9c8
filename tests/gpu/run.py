"""Everything that needs a GPU, in steps of under ten minutes each, without a network: `make gpu`.

    python3 tests/gpu/run.py [--step NAME] [--out FOLDER]

Uses the torch, triton and cupy of the Python that runs it. Results, logs and a summary go to one folder.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 590  # seconds a step may take
PYTHON = sys.executable
SITE = ROOT / "build" / "gpu-site"


class Run:
    """One command after the other, each with its log; stops at the first that fails."""

    def __init__(self, out: Path) -> None:
        self.out = out
        out.mkdir(parents=True, exist_ok=True)
        self.environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(SITE), str(ROOT / "tests")])}

    def __call__(self, name: str, *command: str | Path) -> None:
        log = self.out / f"{name}.log"
        line = " ".join(map(str, command))
        print(f"[{name}] {line}", flush=True)
        began = time.monotonic()
        with log.open("w") as file:
            file.write(f"$ {line}\n")
            file.flush()
            try:
                code = subprocess.run(
                    list(map(str, command)),
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=self.environment,
                    cwd=self.out,
                    timeout=LIMIT,
                ).returncode
            except subprocess.TimeoutExpired:
                code = 124
        print(f"[{name}] {'ok' if code == 0 else f'failed ({code})'} in {time.monotonic() - began:.0f} s", flush=True)
        if code:
            print("\n".join(log.read_text(errors="replace").splitlines()[-40:]))
            raise SystemExit(f"step {name} failed; log: {log}")


def build(run: Run) -> None:
    """A copy of the package for this machine's GPU alone, beside whatever is installed."""
    shutil.rmtree(SITE, ignore_errors=True)
    run.environment["LEANOPS_CUDA_ARCHS"] = _arch()
    pip = [PYTHON, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--target", SITE, ROOT]
    run("build", *pip)
    run("info", PYTHON, "-m", "leanops.bench.cli", "info")


def _arch() -> str:
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}"


def _pytest(run: Run, name: str, *arguments: str | Path) -> None:
    common = ["-q", "-rs", "-p", "no:cacheprovider", f"--rootdir={ROOT}", "-c", ROOT / "pyproject.toml"]
    run(name, PYTHON, "-m", "pytest", *common, *arguments)


def device(run: Run) -> None:
    """The device suite: every backend against the reference's bits."""
    for suite in ("device", "device_sm3"):
        _pytest(run, suite, ROOT / "tests" / "gpu" / f"test_{suite}.py")


def generic(run: Run) -> None:
    """The generic suites of every operator, on the device."""
    _pytest(run, "generic", ROOT / "tests" / "ops", "--leanops-device", "cuda")


def exhaustive(run: Run) -> None:
    """Arithmetic without range tests against the compiler's: square roots of every mantissa, quotients of many."""
    program = run.out / "exhaustive"
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    source = ROOT / "tests" / "gpu" / "exhaustive.cu"
    run("exhaustive-build", nvcc, "-std=c++17", f"-arch=sm_{_arch()}", f"-I{ROOT / 'csrc'}", "-o", program, source)
    run("exhaustive", program)
    program.unlink()


def _sanitize(run: Run, tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    # torch's caching allocator would hide what lies beyond a tensor
    run.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    try:
        options = ["--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
        options += ["--kernel-name", "kernel_substring=zo_kernel", "--kernel-name", "kernel_substring=upload_kernel"]
        options += ["--kernel-name", "kernel_substring=combine_kernel", "--kernel-name", "kernel_substring=add_bias"]
        options += ["--kernel-name", "kernel_substring=sm3_kernel"]
        run(tool, sanitizer, *options, PYTHON, ROOT / "tests" / "gpu" / "driver.py")
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
    step.__name__: step for step in (build, exhaustive, device, generic, memcheck, racecheck, bench)
}


def describe() -> dict[str, str]:
    """Machine and versions, for the results folder."""
    import torch

    facts = {"python": sys.version.split()[0], "torch": torch.__version__, "cuda": str(torch.version.cuda)}
    facts["device"] = torch.cuda.get_device_name()
    facts["commit"] = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip() or "unknown"  # fmt: skip
    for package in ("triton", "cupy", "numpy"):
        try:
            facts[package] = __import__(package).__version__
        except ImportError:
            facts[package] = "not installed"
    smi = shutil.which("nvidia-smi")
    if smi:
        query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
        facts["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return facts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", action="append", choices=list(STEPS), help="only this step; may be repeated")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-results")
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print(f"run.py: no CUDA device is visible to torch {torch.__version__}", file=sys.stderr)
        return 2
    run = Run(options.out.resolve())
    facts = describe() | {"command": " ".join(sys.argv)}
    (run.out / "machine.json").write_text(json.dumps(facts, indent=1) + "\n")
    for name in options.step or STEPS:
        STEPS[name](run)
    print(f"results: {run.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
