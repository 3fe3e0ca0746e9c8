"""Builds the CPU emulation of the CUDA cores and puts it in CuPy's place."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from native.build import ROOT, build, object_of

from leanops.common import nvrtc

# a vector access to an address that does not suit it ends the process, as on the device
_FLAGS = "-std=c++17 -O1 -ffp-contract=off -fPIC -fsanitize=alignment -fsanitize-undefined-trap-on-error"


def build_emulator() -> ctypes.CDLL:
    """The emulator with the kernels that every family adds in ``tests/FAMILY/emulator.cpp``."""
    flags = (*_FLAGS.split(), "-Icsrc", "-Itests/gpu", "-Wno-unknown-pragmas")
    sources = [ROOT / "tests/gpu/emulator/emulator.cpp", *sorted(ROOT.glob("tests/*/emulator.cpp"))]
    objects = [object_of(source, flags) for source in sources]
    return ctypes.CDLL(str(build("emulator", objects, ["-shared"], ".so")))


class Emulator:
    """``launch`` and ``processors`` of :mod:`leanops.common.nvrtc`, for CPU tensors."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.launches: list[str] = []
        self.order = 0  # of blocks and threads: 0 forwards, 1 backwards, another number is the seed of a mixed order

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
