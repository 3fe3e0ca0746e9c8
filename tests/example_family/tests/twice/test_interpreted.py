"""The Triton kernel under Triton's interpreter."""

from __future__ import annotations

import importlib

import pytest
from aot.kernels import NO_TRITON
from twice import agreement

pytest.importorskip("triton", reason=NO_TRITON)
triton = importlib.import_module("leanops.twice.triton")


def test_the_kernel_has_the_bits_of_the_reference():
    agreement.every_kernel(triton, "cpu")
