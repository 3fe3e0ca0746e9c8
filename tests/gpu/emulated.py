"""Builds the CPU emulation of the CUDA cores and puts it in CuPy's place."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from leanops import _nvrtc

ROOT = Path(__file__).resolve().parents[2]


def build(folder: Path) -> ctypes.CDLL:
    """Compile the emulator; None where there is no compiler."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    assert compiler is not None, "no C++ compiler"
    library = folder / "emulator.so"
    source = ROOT / "tests" / "gpu" / "emulator" / "emulator.cpp"
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", f"-I{ROOT / 'csrc'}", "-Wno-unknown-pragmas"]
    subprocess.run([compiler, *flags, "-o", str(library), str(source)], check=True)
    return ctypes.CDLL(str(library))


class Emulator:
    """Has the signatures of ``_nvrtc.launch`` and ``_nvrtc.processors``, for CPU tensors."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.launches: list[str] = []

    def launch(self, kernel: _nvrtc.Kernel, like: torch.Tensor, grid: int, arguments: Sequence[Any]) -> None:
        assert grid > 0, "a launch of no blocks is an error on the device"
        arrays = [np.ascontiguousarray(a).reshape(1) for a in arguments]
        pointers = (ctypes.c_void_p * len(arrays))(*(a.ctypes.data for a in arrays))
        status = self.library.leanops_emulate(kernel.body.encode(), grid, kernel.threads, pointers)
        assert status == 0, f"the emulator has no {kernel.body}"
        self.launches.append(kernel.body)

    def processors(self, like: torch.Tensor) -> int:
        return 1
