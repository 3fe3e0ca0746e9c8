"""AVX-512 emulated (``csrc/testing/avx512/immintrin.h``) is AVX-512, intrinsic by intrinsic."""

from __future__ import annotations

import re

import numpy as np
import pytest
from native.build import EMULATED, ROOT

SPECIAL = """
    00000000 80000000 3f800000 bf800000 7f800000 ff800000 7fc00000 ffc12345 7f800001 ff812345 00000001 807fffff 00800000
    7f7fffff 4effffff 4f000000 cf000000 cf000001 4f800000 3f000000 bf000000 3fc00000 40200000 4b000001 477fefff 477ff000
    33000000 33000001 38800000 387fffff 3f801000 3f803000 0000ffff ffffffff 7fffffff 00000010 0000001f 00000020
"""


def called(text: str) -> set[str]:
    return set(re.findall(r"\b_mm(?:256|512)?_[a-z]\w*(?=\()", text))


def test_every_intrinsic_of_the_kernels_is_compared(native):
    used = called((ROOT / "csrc/common/simd_avx512.h").read_text())
    emulated = called((ROOT / "csrc/testing/avx512/immintrin.h").read_text())
    assert len(used) > 50
    assert used == emulated == called(" ".join(native.avx512.intrinsics()))


def operands(rows: int) -> tuple[np.ndarray, ...]:
    """Three operands of random bits, of ordinary numbers and of special values, [rows, 16] each, and masks, [rows]."""
    rng = np.random.default_rng(rows)
    special = np.array([int(word, 16) for word in SPECIAL.split()], np.uint32)

    def operand() -> np.ndarray:
        bits = rng.integers(0, 2**32, (rows, 16), np.uint32)
        ordinary = (rng.standard_normal((rows, 16)) * 10.0 ** rng.integers(-9, 10, (rows, 16))).astype(np.float32)
        kind = rng.integers(0, 4, (rows, 16))
        return np.choose(kind, [bits, ordinary.view(np.uint32), rng.choice(special, (rows, 16)), bits & np.uint32(63)])

    return operand(), operand(), operand(), rng.integers(0, 2**32, rows, np.uint32)


ARITHMETIC = ("add_ps", "sub_ps", "mul_ps", "div_ps", "fmadd_ps", "sqrt_ps")  # a NaN has any sign and payload


def test_each_emulated_intrinsic_is_the_processors(native):
    if "avx512" not in native.isas():
        pytest.skip("this processor has no AVX-512 to compare the emulation with")
    a, b, c, masks = operands(20_000)
    every_pair = np.arange(2**16, dtype=np.uint32).reshape(-1, 16)  # as 16-bit numbers: each of them twice
    a[: len(every_pair)] = every_pair | every_pair[::-1] << 16
    for name in native.avx512.intrinsics():
        expected, emulated = (
            native.avx512.intrinsic(kernels, name, *(x.view(np.uint8) for x in (a, b, c)), masks).view(np.uint32)
            for kernels in ("avx512", EMULATED)
        )
        same = expected == emulated
        if name.split("(")[0].removeprefix("_mm512_") in ARITHMETIC:
            same |= np.isnan(expected.view(np.float32)) & np.isnan(emulated.view(np.float32))
        row = int(np.argmin(same.all(1)))
        assert same.all(), (
            f"{name} of {a[row]}, {b[row]}, {c[row]}, {masks[row]:x}: {emulated[row]}, not {expected[row]}"
        )
