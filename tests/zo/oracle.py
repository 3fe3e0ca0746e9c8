"""The definition zo/1 written a second time, in NumPy. Tests compare the compiled kernels with it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from common.oracle import Array, decode, encode, f32, fma, philox, rounding_bits, u32

STREAM = {"gaussian": 0, "rademacher": 1, "left": 3, "right": 4}


def _coefficients(text: str) -> list[np.float32]:
    return [f32(float.fromhex(value)) for value in text.split()]


LOG = _coefficients(
    "-0x1.00001p+1 0x1.fffd2cp-1 -0x1.5520fp-1 0x1.007cb6p-1 -0x1.a789b4p-2 0x1.5b9f46p-2 -0x1.5ca78ap-3"
)
SIN = _coefficients("-0x1.921fb4p+1 0x1.4abbb6p+2 -0x1.466778p+1 0x1.323324p-1 -0x1.3c4d66p-4")
COS = _coefficients("0x1.fffffep-1 -0x1.3bd3a6p+2 0x1.03bd06p+2 -0x1.54f61ap+0 0x1.c1f066p-3")
MINUS_2_LN_2 = f32(float.fromhex("-0x1.62e43p+0"))


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
    elements = np.arange(index, index + n, dtype=np.int64)
    factors = []
    for lines, seed, stream in ((elements // columns, left, "left"), (elements % columns, right, "right")):
        first, end = int(lines.min()), int(lines.max()) + 1
        factor = noise(seed, tensor_id, first * rank, (end - first) * rank, stream).reshape(-1, rank)
        factors.append(factor[lines - first])
    u, v = factors
    z = u[:, 0] * v[:, 0]
    for p in range(1, rank):
        z = fma(u[:, p], v[:, p], z)
    return z


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
