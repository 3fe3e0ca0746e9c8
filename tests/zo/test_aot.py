"""The kernels of zo fit sm_80, sm_90 and sm_100 without spills, and keep to their budget of instructions."""

from __future__ import annotations

from aot.checks import cuda_rows, over_archs, triton_rows

# instructions an element. On an H200 an in-place axpy in bf16 is bandwidth-bound up to 28 of them; Gaussian noise by
# IEEE arithmetic alone took 47.5
BUDGET = {"gaussian": 40.0, "rademacher": 8.0}


@over_archs
def test_cuda_kernels_fit(arch):
    rows = cuda_rows(arch, "zo")
    assert len(rows) >= 45
    assert [r for r in rows if r.local_bytes] == []
    counted = {r.kernel: r.instructions for r in rows}
    for distribution, most in BUDGET.items():
        for dtype in ("float", "bf16", "fp16"):
            for kernel in ("noise", "axpy"):
                instructions = counted[f"{kernel} {dtype} {distribution}"]
                assert instructions is not None
                assert 1 < instructions <= most, f"{kernel} {dtype} {distribution}: {instructions}"


@over_archs
def test_triton_kernels_fit(arch, tmp_path):
    rows = triton_rows(arch, tmp_path, "zo")
    assert len(rows) >= 40
    assert [r for r in rows if r.local_bytes] == []
