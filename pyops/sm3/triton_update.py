"""The arithmetic of sm3/1 in Triton: ``reference`` step by step, on tiles of [rows, columns].

No product and sum that the definition rounds separately may be fused, so every kernel that uses these functions is
launched with ``enable_fp_fusion=False``; the fused ones are written ``tl.fma``.
"""

# Triton reads annotations of kernels as types of its own
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from leanops.common.triton import narrow, widen


@triton.jit
def min_or_nan(a, b):
    """The smaller one; NaN if either is."""
    return tl.where((a < b) | (a != a), a, b)


@triton.jit
def bits_of(x):
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def quotient(g, nu, eps):
    """u = g / sqrt(nu + eps), and 0 where nu is 0."""
    return tl.where(nu == 0.0, 0.0, tl.div_rn(g, tl.sqrt_rn(nu + eps)))


@triton.jit
def average(momentum, scale, index, block, mask, row_mask, u, kept, share, MOMENTUM: tl.constexpr):
    """m = share u + kept m_old, stored, and returned in fp32. Of int8 momenta, a tile's row lies in one block."""
    # MOMENTUM: 1 fp32, 2 bf16, 3 int8
    if MOMENTUM == 1:
        at = momentum.to(tl.pointer_type(tl.float32)) + index
        m = tl.fma(tl.zeros_like(u) + share, u, kept * tl.load(at, mask=mask, other=0.0))
        tl.store(at, m, mask=mask)
    elif MOMENTUM == 2:
        at = momentum.to(tl.pointer_type(tl.bfloat16)) + index
        old = widen(tl.load(at, mask=mask, other=0.0), tl.float32)
        m = tl.fma(tl.zeros_like(u) + share, u, kept * old)
        tl.store(at, narrow(m, tl.bfloat16), mask=mask)
    else:
        at = momentum.to(tl.pointer_type(tl.int8)) + index
        scales = scale.to(tl.pointer_type(tl.float32)) + block
        s = tl.load(scales, mask=row_mask, other=0.0)
        m = tl.load(at, mask=mask, other=0).to(tl.float32) * tl.expand_dims(s, 1)
        m = tl.fma(tl.zeros_like(u) + share, u, kept * m)
        largest = tl.max(bits_of(m) & 0x7FFFFFFF, axis=1)
        lost = largest >= 0x7F800000
        zero = largest < 0x03800000  # 2^-120
        a = tl.where(lost | zero, 127.0, largest.to(tl.float32, bitcast=True))
        s = tl.where(lost, float("nan"), tl.where(zero, 0.0, tl.div_rn(a, tl.zeros_like(a) + 127.0)))
        inverse = tl.where(zero, 0.0, tl.div_rn(tl.zeros_like(a) + 127.0, a))
        # adding 1.5 2^23 rounds to an integer, ties to even
        code = (tl.where(lost[:, None], 0.0, m) * inverse[:, None] + 12582912.0) - 12582912.0
        tl.store(at, tl.where(lost[:, None], 1.0, code).to(tl.int8), mask=mask)
        tl.store(scales, s, mask=row_mask)
    return m


@triton.jit
def moved(w, step, lr, keep):
    """w keep - lr step: one fma in fp32, two roundings in fp64."""
    if w.dtype == tl.float64:
        out = w * keep - lr * step.to(tl.float64)
    else:
        minus = -1.0 * lr.to(tl.float32)  # -lr is 0 - lr to Triton, which loses the sign where lr is 0
        out = tl.fma(tl.broadcast_to(minus, w.shape), step, w * keep.to(tl.float32))
    return out
