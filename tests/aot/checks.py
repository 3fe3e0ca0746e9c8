"""What the families' tests of their kernels for GPUs share."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from aot import aot
from aot.kernels import NO_TRITON

over_archs = pytest.mark.parametrize("arch", aot.ARCHS)


def cuda_rows(arch: int, family: str) -> list[aot.Row]:
    """A family's kernels in the CUDA library; skips where there is no code for the architecture."""
    if reason := aot.no_library():
        pytest.skip(reason)
    rows = aot.cuda_rows(arch, family)
    if not rows and "LEANOPS_CUDA_ARCHS" in os.environ:
        pytest.skip(f"LEANOPS_CUDA_ARCHS is set, and the CUDA library has no code for sm_{arch}")
    print(aot.markdown(rows))
    return rows


def triton_rows(arch: int, folder: Path, family: str, names: Sequence[str] | None = None) -> list[aot.Row]:
    """A family's Triton kernels, or those of these names; skips where there is no Triton."""
    if not aot.find_triton():
        pytest.skip(NO_TRITON)
    rows = aot.triton_rows(arch, folder, family, names)
    print(aot.markdown(rows))
    return rows
