"""Builds the CPU emulation of the CUDA cores and puts it in CuPy's place."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from leanops.common import nvrtc

ROOT = Path(__file__).resolve().parents[2]
# a vector access to an address that does not suit it ends the process, as on the device
_FLAGS = "-std=c++17 -O1 -ffp-contract=off -fPIC -fsanitize=alignment -fsanitize-undefined-trap-on-error"


def build(folder: Path) -> ctypes.CDLL:
    """Compile the emulator."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    assert compiler is not None, "no C++ compiler"
    flags = [*_FLAGS.split(), f"-I{ROOT / 'csrc'}", "-Wno-unknown-pragmas"]

    def compile_one(source: Path) -> str:
        target = str(folder / f"{source.stem}.o")
        subprocess.run([compiler, *flags, "-c", "-o", target, str(source)], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, (ROOT / "tests" / "gpu" / "emulator").glob("*.cpp")))
    library = folder / "emulator.so"
    subprocess.run([compiler, "-shared", "-o", str(library), *objects], check=True)
    return ctypes.CDLL(str(library))


class Emulator:
    """Has the signatures of ``nvrtc.launch`` and ``nvrtc.processors``, for CPU tensors."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.launches: list[str] = []
        self.order = 0  # of blocks and threads: 0 as numbered, 1 backwards, others mixed

    def launch(self, kernel: nvrtc.Kernel, like: torch.Tensor, grid: int, arguments: Sequence[Any]) -> None:
        assert grid > 0, "a launch of no blocks is an error on the device"
        arrays = [np.ascontiguousarray(a).reshape(1) for a in arguments]
        pointers = (ctypes.c_void_p * len(arrays))(*(a.ctypes.data for a in arrays))
        status = self.library.leanops_emulate(kernel.body.encode(), grid, kernel.threads, pointers, self.order)
        assert status != 1, f"the emulator has no {kernel.body}"
        assert status == 0, f"{kernel.body} never ends"
        self.launches.append(kernel.body)

    def processors(self, like: torch.Tensor) -> int:
        return 1
