"""zo/1 a second time, in NumPy and from its definition alone: what the compiled kernels are compared with.

fp32 fma is emulated exactly: the product of two floats is exact in float64; the sum is rounded to odd there, so that
the final rounding to float32 is the only one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

f32, u16, u32, u64 = np.float32, np.uint16, np.uint32, np.uint64
Array = NDArray[np.generic]
STREAM = {"gaussian": 0, "rademacher": 1, "rounding": 2, "left": 3, "right": 4}


def _coefficients(text: str) -> list[np.float32]:
    return [f32(float.fromhex(value)) for value in text.split()]


LOG = _coefficients(
    "-0x1.00001p+1 0x1.fffd2cp-1 -0x1.5520fp-1 0x1.007cb6p-1 -0x1.a789b4p-2 0x1.5b9f46p-2 -0x1.5ca78ap-3"
)
SIN = _coefficients("-0x1.921fb4p+1 0x1.4abbb6p+2 -0x1.466778p+1 0x1.323324p-1 -0x1.3c4d66p-4")
COS = _coefficients("0x1.fffffep-1 -0x1.3bd3a6p+2 0x1.03bd06p+2 -0x1.54f61ap+0 0x1.c1f066p-3")
MINUS_2_LN_2 = f32(float.fromhex("-0x1.62e43p+0"))


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


def _horner(coefficients: Sequence[np.float32], x: Array) -> Array:
    p = np.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        p = fma(p, x, coefficient)
    return p


def box_muller(a: Array, b: Array) -> tuple[Array, Array]:
    i = ((a >> u32(8)) + u32(1)).astype(f32).view(np.int32) - np.int32(0x4B400000)
    e = (i >> 23).astype(f32)
    f = ((i & 0x7FFFFF) + np.int32(0x3F400000)).view(f32) - f32(1)
    rho = np.sqrt(fma(e, MINUS_2_LN_2, f * _horner(LOG, f)))
    y = (((b >> u32(8)) & u32(0x7FFFFF)) | u32(0x3F800000)).view(f32) - f32(1.5)
    s = y * y
    rho = (rho.view(u32) ^ (b & u32(0x80000000))).view(f32)
    return rho * (_horner(SIN, s) * y), rho * _horner(COS, s)


def noise(seed: int, tensor_id: int, index: int, n: int, distribution: str) -> Array:
    """z as float32.                                                                                  [n]"""
    per_block = 128 if distribution == "rademacher" else 4
    first, last = index // per_block, (index + n + per_block - 1) // per_block
    words = philox(first, last - first, tensor_id, STREAM[distribution], seed)
    if distribution == "rademacher":
        bits = (words.reshape(-1, 1) >> np.arange(32, dtype=u32)) & u32(1)
        z = f32(1) - f32(2) * bits.reshape(-1).astype(f32)
    else:
        z = np.stack(box_muller(words[:, 0::2].copy(), words[:, 1::2].copy()), -1).reshape(-1)
    return z[index % per_block :][:n]


def low_rank(left: int, right: int, tensor_id: int, index: int, n: int, columns: int, rank: int) -> Array:
    """z = U V^T at consecutive elements of a matrix.                                                 [n]"""
    at = np.arange(index, index + n, dtype=np.int64)
    factors = []
    for lines, seed, stream in ((at // columns, left, "left"), (at % columns, right, "right")):
        low, high = int(lines.min()), int(lines.max()) + 1
        made = noise(seed, tensor_id, low * rank, (high - low) * rank, stream).reshape(-1, rank)
        factors.append(made[lines - low])
    u, v = factors
    z = u[:, 0] * v[:, 0]
    for p in range(1, rank):
        z = fma(u[:, p], v[:, p], z)
    return z


def rounding_bits(seed: int, tensor_id: int, index: int, n: int) -> Array:
    words = philox(index // 8, (index + n + 7) // 8 - index // 8, tensor_id, STREAM["rounding"], seed).reshape(-1)
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
    """The array that holds x in dtype: uint16 bits for the 16-bit formats."""
    if dtype == "bfloat16":
        return to_bfloat16(x, r)
    if dtype == "float16":
        return to_float16(x, r)
    return np.asarray(x, dtype)


def decode(held: Array, dtype: str) -> Array:
    if dtype == "bfloat16":
        return (held.astype(u32) << u32(16)).view(f32)
    return held.view(np.float16).astype(f32) if dtype == "float16" else held


def axpy(
    p: Array,
    dtype: str,
    seeds: Sequence[int],
    coeffs: Sequence[float],
    decays: Sequence[float],
    tensor_id: int,
    index: int,
    distribution: str,
    stochastic: bool,
    sequential: bool,
    right_seeds: Sequence[int] = (),
    columns: int = 0,
    rank: int = 2,
) -> Array:
    work = np.float64 if dtype == "float64" else f32
    keeps = [work(1.0 - d) for d in decays] * (len(seeds) if len(decays) == 1 else 1)
    n = len(p)

    def rounded(value: Array, seed: int) -> Array:
        random = stochastic and dtype in ("bfloat16", "float16")
        return encode(value, dtype, rounding_bits(seed, tensor_id, index, n) if random else None)

    acc = decode(p, dtype).astype(work)
    with np.errstate(all="ignore"):
        if not sequential:
            acc = acc * work(1.0 - decays[0])
        for k, seed in enumerate(seeds):
            if columns and n:
                z = low_rank(seed, right_seeds[k], tensor_id, index, n, columns, rank)
            else:
                z = noise(seed, tensor_id, index, n, "gaussian" if distribution == "lowrank" else distribution)
            if sequential:
                acc = acc * keeps[k]
            acc = acc + coeffs[k] * z.astype(work) if work is np.float64 else fma(f32(coeffs[k]), z, acc)
            if sequential:
                acc = decode(rounded(acc, seed), dtype).astype(work)
        if sequential or not seeds:
            return encode(acc, dtype)
        return rounded(acc, seeds[0])


def same(got: Array, want: Array, dtype: str) -> bool:
    """Bit for bit, but any NaN is any NaN."""
    nan = np.isnan(decode(got, dtype)) & np.isnan(decode(want, dtype))
    bits = f"u{got.dtype.itemsize}"
    return bool(np.all((got.view(bits) == want.view(bits)) | nan))
