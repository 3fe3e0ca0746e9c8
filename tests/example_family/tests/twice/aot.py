"""The kernels of twice for GPUs, as the launchers launch them."""

from __future__ import annotations

from collections.abc import Iterable

from aot.kernels import GpuKernels, Source

from leanops.twice import nvrtc


def _triton(arch: int) -> Iterable[Source]:
    from leanops.twice import triton

    signature = {"y": "*fp32", "x": "*fp32", "n": "i64"}
    yield Source("twice fp32", triton.kernel, signature, {"BLOCK": triton.BLOCK}, {"num_warps": 4})


KERNELS = GpuKernels(_triton, lambda: [nvrtc.KERNEL])
