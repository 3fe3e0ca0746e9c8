"""The CUDA core, thread by thread on the CPU."""

from __future__ import annotations

from twice import agreement

from leanops.twice import nvrtc


def test_the_core_has_the_bits_of_the_reference(emulator):
    agreement.every_kernel(nvrtc, "cpu")
    assert emulator.launches == ["twice::run"]
