"""The C++ core."""

from __future__ import annotations

import numpy as np


def test_every_set_of_kernels_gives_the_bits_of_the_definition(native):
    x = np.linspace(-3, 3, 1001, dtype=np.float32)
    for isa in native.kernel_sets():
        np.testing.assert_array_equal(native.twice.run(isa, x), 2 * x)
