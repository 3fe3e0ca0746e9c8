"""Philox, fma and the 16-bit formats in NumPy, written from their definitions. Tests compare compiled code with them.

fp32 fma is emulated exactly: the product of two floats is exact in float64; the sum is rounded to odd there, so that
the final rounding to float32 is the only one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

f32, u16, u32, u64 = np.float32, np.uint16, np.uint32, np.uint64
Array = NDArray[np.generic]
ROUNDING = 2  # the stream of stochastic rounding
# counter, key, words: Random123, kat_vectors, philox4x32 10
KNOWN_PHILOX = (
    ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
)


def philox(first: int, count: int, tensor_id: int, stream: int, seed: int) -> Array:
    """Words of blocks first .. first + count - 1.                                                    [count, 4]"""
    low = u64(0xFFFFFFFF)
    block = np.arange(first, first + count, dtype=u64)
    x = [block & low, block >> u64(32), np.full_like(block, tensor_id), np.full_like(block, stream)]
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        p0, p1 = x[0] * u64(0xD2511F53), x[2] * u64(0xCD9E8D57)
        x = [(p1 >> u64(32)) ^ x[1] ^ u64(k0), p1 & low, (p0 >> u64(32)) ^ x[3] ^ u64(k1), p0 & low]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(x, -1).astype(u32)


def fma(a: Array, b: Array, c: Array) -> Array:
    a, b, c = (np.asarray(v, f32).astype(np.float64) for v in (a, b, c))
    with np.errstate(all="ignore"):
        product = a * b
        total = product + c
        back = total - product
        error = (product - (total - back)) + (c - back)  # TwoSum: total + error is the exact sum
        inexact = (error != 0) & np.isfinite(total) & (total.view(np.int64) & 1 == 0)
        odd = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
        return np.where(inexact, odd, total).astype(f32)


def rounding_bits(seed: int, tensor_id: int, index: int, n: int) -> Array:
    words = philox(index // 8, (index + n + 7) // 8 - index // 8, tensor_id, ROUNDING, seed).reshape(-1)
    return np.stack([words & u32(0xFFFF), words >> u32(16)], -1).reshape(-1)[index % 8 :][:n]


def to_bfloat16(x: Array, r: Array | None = None) -> Array:
    bits = np.ascontiguousarray(x, f32).view(u32)
    up = u32(0x7FFF) + ((bits >> u32(16)) & u32(1)) if r is None else np.where(np.isfinite(x), r, u32(0))
    return np.where(np.isnan(x), u32(0x7FC0), (bits + up) >> u32(16)).astype(u16)


def to_float16(x: Array, r: Array | None = None) -> Array:
    x = np.ascontiguousarray(x, f32)
    with np.errstate(all="ignore"):
        nearest = x.astype(np.float16).view(u16)
        if r is None:
            return nearest
        small = np.abs(x) < f32(2.0**-14)
        normal = ((x.view(u32) + (r >> u32(3))) & ~u32(0x1FFF)).view(f32).astype(np.float16).view(u16)
        count = ((np.where(small, np.abs(x), 0) * f32(2.0**40)).astype(u32) + r) >> u32(16)
        tiny = ((x.view(u32) >> u32(16)) & u32(0x8000)).astype(u16) | count.astype(u16)
        return np.where(np.isfinite(x), np.where(small, tiny, normal), nearest)


def encode(x: Array, dtype: str, r: Array | None = None) -> Array:
    """x in dtype, as an array; the 16-bit formats as bits in uint16. ``r``: random bits for stochastic rounding."""
    if dtype == "bfloat16":
        return to_bfloat16(x, r)
    if dtype == "float16":
        return to_float16(x, r)
    return np.asarray(x, dtype)


def decode(held: Array, dtype: str) -> Array:
    if dtype == "bfloat16":
        return (held.astype(u32) << u32(16)).view(f32)
    return held.view(np.float16).astype(f32) if dtype == "float16" else held


def same(got: Array, want: Array, dtype: str) -> bool:
    """Whether the bits are equal; any NaN equals any other."""
    nan = np.isnan(decode(got, dtype)) & np.isnan(decode(want, dtype))
    bits = f"u{got.dtype.itemsize}"
    return bool(np.all((got.view(bits) == want.view(bits)) | nan))
