"""Runs the torch-free cores under ASan with UBSan, and under TSan, on every instruction set of this machine.

    python tests/native/sanitize.py [address,undefined] [thread]

Exits 1 on the first report of a sanitizer or on threads whose bits differ from one thread's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from native.build import build_driver, isa_flags

SANITIZERS = ["address,undefined", "thread"]


def run(driver: Path, isa: str) -> subprocess.CompletedProcess[str]:
    options = {
        "ASAN_OPTIONS": "detect_leaks=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1",
    }
    # GCC 12's TSan refuses the layouts of kernels that randomise more address bits: none are randomised
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []
    environment = {**os.environ, **options, "LEANOPS_CPU_ISA": isa}
    return subprocess.run([*fixed, str(driver)], env=environment, capture_output=True, text=True)


def main(chosen: list[str]) -> int:
    for sanitizers in chosen or SANITIZERS:
        began = time.monotonic()
        driver = build_driver(sanitizers)
        print(f"{sanitizers}: built in {time.monotonic() - began:.0f} s", flush=True)
        for isa in isa_flags():
            began = time.monotonic()
            done = run(driver, isa)
            if done.returncode == 2 and "supports no more" in done.stderr:
                print(f"{sanitizers}: {isa} skipped: {done.stderr.strip()}")
                continue
            print(f"{sanitizers}: {done.stdout.strip()} in {time.monotonic() - began:.0f} s", flush=True)
            if done.returncode:
                print(done.stderr, file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
