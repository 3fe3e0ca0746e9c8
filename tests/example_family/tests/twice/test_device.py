"""Every CUDA backend on a real device."""

from __future__ import annotations

import pytest
from twice import agreement

pytestmark = pytest.mark.gpu


def test_the_bits_of_the_reference(backend):
    agreement.every_kernel(backend, "cuda")
