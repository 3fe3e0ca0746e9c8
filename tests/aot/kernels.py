"""The description of a family's kernels for GPUs. ``tests/FAMILY/aot.py`` holds it in the constant ``KERNELS``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import families

from leanops.common import nvrtc

Code = list[tuple[int, str]]  # (address, instruction)
NO_TRITON = "Triton is not installed: pip install 'leanops[triton]'"


class Source(NamedTuple):
    """A Triton kernel as its launcher launches it."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]


@dataclass(frozen=True)
class GpuKernels:
    """A family's kernels.

    Attributes:
        triton: The Triton kernels that are launched on an architecture (80, 90, …).
        nvrtc: The kernels that NVRTC compiles at first use, or enough of them to reach every line of the cores.
        cuda_name: The name that a table shows for a kernel of the CUDA library, given c++filt's; None: its plain name.
        instructions: Instructions an element, from a kernel's name in the tables and its machine code; None: unknown.
        counted: Whether ``instructions`` is to be asked for a kernel of this name.
    """

    triton: Callable[[int], Iterable[Source]] = lambda arch: ()
    nvrtc: Callable[[], Sequence[nvrtc.Kernel]] = lambda: ()
    cuda_name: Callable[[str], str | None] = lambda demangled: None
    instructions: Callable[[str, Code], float | None] = lambda name, code: None
    counted: Callable[[str], bool] = lambda name: False


def of(family: str) -> GpuKernels:
    """A family's kernels; none where it has no ``aot.py``."""
    if family not in families.having("aot.py"):
        return GpuKernels()
    kernels: GpuKernels = families.module(family, "aot").KERNELS
    return kernels
