"""The noise of zo/1 in Triton: ``reference`` step by step.

The definition rounds some products and sums separately, and these must not be fused. So every kernel that uses these
functions is launched with ``enable_fp_fusion=False``, and writes a fused operation as ``tl.fma``.
"""

# Triton reads annotations of kernels as its own types
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from leanops.common import streams
from leanops.common.triton import in_order, philox, select_word

GAUSSIAN = tl.constexpr(streams.GAUSSIAN)
RADEMACHER = tl.constexpr(streams.RADEMACHER)

# the polynomials of the definition, exact in fp32
_L0, _L1, _L2, _L3, _L4, _L5, _L6 = (
    tl.constexpr(float.fromhex(c))
    for c in (
        "-0x1.00001p+1", "0x1.fffd2cp-1", "-0x1.5520fp-1", "0x1.007cb6p-1",
        "-0x1.a789b4p-2", "0x1.5b9f46p-2", "-0x1.5ca78ap-3",
    )
)  # fmt: skip
_S0, _S1, _S2, _S3, _S4 = (
    tl.constexpr(float.fromhex(c))
    for c in ("-0x1.921fb4p+1", "0x1.4abbb6p+2", "-0x1.466778p+1", "0x1.323324p-1", "-0x1.3c4d66p-4")
)
_C0, _C1, _C2, _C3, _C4 = (
    tl.constexpr(float.fromhex(c))
    for c in ("0x1.fffffep-1", "-0x1.3bd3a6p+2", "0x1.03bd06p+2", "-0x1.54f61ap+0", "0x1.c1f066p-3")
)
_MINUS_2_LN2 = tl.constexpr(float.fromhex("-0x1.62e43p+0"))


@triton.jit
def box_muller(a, b):
    """sqrt(-2 ln u1) (cos 2 pi u2, sin 2 pi u2) of words a and b: [...] each, as all values here are.

    u1 = ((a >> 8) + 1) 2^-24 = 2^e (1 + f), with 1 + f in [0.75, 1.5). u2 = (b >> 8) 2^-24.
    """
    i = ((a >> 8) + 1).to(tl.float32).to(tl.int32, bitcast=True) - 0x4B400000  # [...]
    e = (i >> 23).to(tl.float32)  # [...]
    f = ((i & 0x7FFFFF) + 0x3F400000).to(tl.float32, bitcast=True) - 1.0  # [...]
    p = tl.fma(tl.zeros_like(f) + _L6, f, _L5)  # [...], -2 ln(1 + f) / f
    p = tl.fma(p, f, _L4)
    p = tl.fma(p, f, _L3)
    p = tl.fma(p, f, _L2)
    p = tl.fma(p, f, _L1)
    p = tl.fma(p, f, _L0)
    t = tl.fma(e, _MINUS_2_LN2, f * p)  # [...], -2 ln u1
    # bit 31 of b is the half of the circle: it becomes the sign of rho. The other bits are y + 1/2 = 2 u2 mod 1.
    rho = (tl.sqrt_rn(t).to(tl.uint32, bitcast=True) ^ (b & 0x80000000)).to(tl.float32, bitcast=True)  # [...]
    y = (((b >> 8) & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True) - 1.5  # [...], in [-0.5, 0.5)
    s = y * y  # [...]
    ps = tl.fma(tl.zeros_like(s) + _S4, s, _S3)  # [...]
    ps = tl.fma(ps, s, _S2)
    ps = tl.fma(ps, s, _S1)
    ps = tl.fma(ps, s, _S0)
    pc = tl.fma(tl.zeros_like(s) + _C4, s, _C3)  # [...]
    pc = tl.fma(pc, s, _C2)
    pc = tl.fma(pc, s, _C1)
    pc = tl.fma(pc, s, _C0)
    return rho * (ps * y), rho * pc  # [...] each


@triton.jit
def signs(words):
    """The signs in words [..., n], bit 0 first: ±1, [..., n, 32]."""
    bits = tl.expand_dims(words, -1) >> tl.arange(0, 32).to(tl.uint32)  # [..., n, 32]
    return 1.0 - 2.0 * (bits & 1).to(tl.float32)  # [..., n, 32]


@triton.jit
def noise(seed, logical, tensor_id, TILE: tl.constexpr, IS_RADEMACHER: tl.constexpr):
    """z [TILE] of the elements from index ``logical`` on, which is a multiple of TILE."""
    if IS_RADEMACHER:
        block = logical // 128 + tl.arange(0, TILE // 128)  # [TILE/128]
        w0, w1, w2, w3 = philox(seed, block, tensor_id, RADEMACHER)  # [TILE/128] each
        words = tl.reshape(in_order(w0, w1, w2, w3), [TILE // 32])  # [TILE/128, 4] -> [TILE/32]
        z = tl.reshape(signs(words), [TILE])  # [TILE/32, 32] -> [TILE]
    else:
        block = logical // 4 + tl.arange(0, TILE // 4)  # [TILE/4]
        w0, w1, w2, w3 = philox(seed, block, tensor_id, GAUSSIAN)  # [TILE/4] each
        z0, z1 = box_muller(w0, w1)  # [TILE/4] each
        z2, z3 = box_muller(w2, w3)  # [TILE/4] each
        z = tl.reshape(in_order(z0, z1, z2, z3), [TILE])  # [TILE/4, 4] -> [TILE]
    return z


@triton.jit
def gaussian_at(seed, index, tensor_id, STREAM: tl.constexpr):
    """Gaussian z of a stream at any indices [...]. Every element computes a whole Philox block for itself."""
    w0, w1, w2, w3 = philox(seed, index >> 2, tensor_id, STREAM)  # [...] each
    first_pair = (index & 2) == 0  # [...]
    even, odd = box_muller(tl.where(first_pair, w0, w2), tl.where(first_pair, w1, w3))  # [...] each
    return tl.where((index & 1) == 0, even, odd)  # [...]


@triton.jit
def noise_at(seed, index, tensor_id, IS_RADEMACHER: tl.constexpr):
    """z at any indices [...]. Every element computes a whole Philox block for itself."""
    if IS_RADEMACHER:
        w0, w1, w2, w3 = philox(seed, index >> 7, tensor_id, RADEMACHER)  # [...] each
        word = select_word((index >> 5) & 3, w0, w1, w2, w3)  # [...]
        z = 1.0 - 2.0 * ((word >> (index & 31).to(tl.uint32)) & 1).to(tl.float32)  # [...]
    else:
        z = gaussian_at(seed, index, tensor_id, GAUSSIAN)  # [...]
    return z


@triton.jit
def accumulate(acc, c, z):
    """acc + c z for acc and z [...]: one fma in fp32, two roundings in fp64, as the definition says."""
    if acc.dtype == tl.float64:
        return acc + c * z.to(tl.float64)  # [...]
    else:
        return tl.fma(tl.broadcast_to(c, acc.shape), z, acc)  # [...]; zeros + c would lose the sign of c = -0
