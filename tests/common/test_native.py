"""What the compiled families share, without torch: Philox and the 16-bit formats."""

from __future__ import annotations

import numpy as np
import pytest
from common.oracle import KNOWN_PHILOX, encode, philox, same


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_PHILOX)
def test_philox_known_answers(native, counter, key, words):
    want = [int(word, 16) for word in words.split()]
    assert native.philox(counter, key) == want
    block, seed = counter[0] | counter[1] << 32, key[0] | key[1] << 32
    assert philox(block, 1, counter[2], counter[3], seed).tolist() == [want]


def test_every_16_bit_float_converts_as_numpy_does(native):
    bits = np.arange(2**16, dtype=np.uint16)
    half = bits.view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(native.fp16_to_float(bits), half)
    np.testing.assert_array_equal(native.bf16_to_float(bits), (bits.astype(np.uint32) << 16).view(np.float32))
    # each value, its neighbours, and the ties between neighbours
    for decoded, convert, dtype in [
        (half, native.float_to_fp16, "float16"),
        (native.bf16_to_float(bits), native.float_to_bf16, "bfloat16"),
    ]:
        raw = decoded.view(np.uint32)
        steps = [0, 1, -1, 0x1000, 0xFFF, 0x1001, 0x8000, 0x7FFF, 0x8001]
        x = np.concatenate([(raw + np.uint32(step & 0xFFFFFFFF)).view(np.float32) for step in steps])
        assert same(convert(x), encode(x, dtype), dtype)
