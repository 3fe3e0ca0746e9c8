"""Runs the torch-free cores under ASan with UBSan, and under TSan, with every instruction set of this machine.

AVX-512 is emulated where the processor lacks it.

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
from native.build import EMULATED, build_driver, kernel_sets

SANITIZERS = ["address,undefined", "thread"]


def run(driver: Path, kernels: str) -> subprocess.CompletedProcess[str]:
    options = {
        "ASAN_OPTIONS": "detect_leaks=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1",
    }
    # GCC 12's TSan fails on Linux kernels that randomise more address bits: switch the randomisation off
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []
    return subprocess.run([*fixed, str(driver), kernels], env={**os.environ, **options}, capture_output=True, text=True)


def main(chosen: list[str]) -> int:
    for sanitizers in chosen or SANITIZERS:
        began = time.monotonic()
        driver = build_driver(sanitizers)
        print(f"{sanitizers}: built in {time.monotonic() - began:.0f} s", flush=True)
        ran: set[str] = set()
        for kernels in kernel_sets():
            if kernels == EMULATED and "avx512" in ran:
                continue
            began = time.monotonic()
            done = run(driver, kernels)
            if done.returncode == 2 and "this machine has no" in done.stderr:
                print(f"{sanitizers}: {kernels} skipped: {done.stderr.strip()}")
                continue
            print(f"{sanitizers}: {done.stdout.strip()} in {time.monotonic() - began:.0f} s", flush=True)
            ran.add(kernels)
            if done.returncode:
                print(done.stderr, file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
