"""The kernels fit sm_80, sm_90 and sm_100."""

from __future__ import annotations

from aot.checks import triton_rows


def test_triton_kernels_fit(tmp_path):
    (row,) = triton_rows(90, tmp_path, "twice")
    assert row.local_bytes == 0
