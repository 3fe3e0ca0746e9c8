"""The kernels of SM3 fit sm_80, sm_90 and sm_100 without spills."""

from __future__ import annotations

import pytest
from aot.aot import ARCHS
from aot.checks import cuda_rows, over_archs, triton_rows
from aot.kernels import NO_TRITON
from sm3.aot import HOST, KERNELS


@over_archs
def test_the_cuda_steps_fit(arch):
    rows = cuda_rows(arch, "sm3")
    assert len(rows) == 24  # 4 dtypes, 4 kinds of momentum, and stochastic rounding for two of the dtypes
    assert [r for r in rows if r.local_bytes > 64] == []  # an array of 64 bytes with computed indices; no spills


# a third of the 24 steps on each architecture, every other one with numbers of the host: 50 seconds an architecture;
# `make aot` compiles all on all
@over_archs
def test_triton_steps_fit(arch, tmp_path):
    pytest.importorskip("triton", reason=NO_TRITON)
    both = [source.name for source in KERNELS.triton(arch)]
    steps = [both[2 * i + i % 2] for i in range(len(both) // 2)]
    rows = triton_rows(arch, tmp_path, "sm3", steps[ARCHS.index(arch) :: len(ARCHS)])
    assert len(rows) == 8
    assert {r.kernel.endswith(HOST) for r in rows} == {False, True}
    assert [r for r in rows if r.local_bytes] == []
