"""The arithmetic of sm3/1 in Triton: ``reference`` step by step, on tiles of [HEIGHT, WIDTH] elements.

The definition rounds some products and sums separately, and these must not be fused. So every kernel that uses these
functions is launched with ``enable_fp_fusion=False``, and writes a fused operation as ``tl.fma``.
"""

# Triton reads annotations of kernels as its own types
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from leanops.common.triton import narrow, widen


@triton.jit
def min_or_nan(a, b):
    """The minimum of a and b, or NaN if one of them is NaN; they broadcast to [...]."""
    return tl.where((a < b) | (a != a), a, b)  # [...]


@triton.jit
def bits_of(x):
    """The bits of fp32 x [...] as uint32."""
    return x.to(tl.uint32, bitcast=True)  # [...]


@triton.jit
def quotient(g, nu, eps):
    """g / sqrt(nu + eps), and 0 where nu is 0. g and nu are [HEIGHT, WIDTH]."""
    return tl.where(nu == 0.0, 0.0, tl.div_rn(g, tl.sqrt_rn(nu + eps)))  # [HEIGHT, WIDTH]


@triton.jit
def average(momentum, scale, index, block, mask, row_mask, u, beta_m, one_minus_beta_m, MOMENTUM: tl.constexpr):
    """m = (1 - beta_m) u + beta_m m_old: stores the momentum and returns it in fp32, [HEIGHT, WIDTH].

    u may be the gradient, too. index, mask, u: [HEIGHT, WIDTH]. block, row_mask: [HEIGHT], because a row of a tile lies
    in one block of an int8 momentum. MOMENTUM: 1 fp32, 2 bf16, 3 int8.
    """
    if MOMENTUM == 1:
        pointers = momentum.to(tl.pointer_type(tl.float32)) + index  # [HEIGHT, WIDTH]
        old = tl.load(pointers, mask=mask, other=0.0)  # [HEIGHT, WIDTH]
        m = tl.fma(tl.zeros_like(u) + one_minus_beta_m, u, beta_m * old)  # [HEIGHT, WIDTH]
        tl.store(pointers, m, mask=mask)  # [HEIGHT, WIDTH]
    elif MOMENTUM == 2:
        pointers = momentum.to(tl.pointer_type(tl.bfloat16)) + index  # [HEIGHT, WIDTH]
        old = widen(tl.load(pointers, mask=mask, other=0.0), tl.float32)  # [HEIGHT, WIDTH]
        m = tl.fma(tl.zeros_like(u) + one_minus_beta_m, u, beta_m * old)  # [HEIGHT, WIDTH]
        tl.store(pointers, narrow(m, tl.bfloat16), mask=mask)  # [HEIGHT, WIDTH]
    else:
        pointers = momentum.to(tl.pointer_type(tl.int8)) + index  # [HEIGHT, WIDTH]
        scale_pointers = scale.to(tl.pointer_type(tl.float32)) + block  # [HEIGHT]
        s = tl.load(scale_pointers, mask=row_mask, other=0.0)  # [HEIGHT]
        old = tl.load(pointers, mask=mask, other=0).to(tl.float32) * tl.expand_dims(s, 1)  # [HEIGHT, WIDTH]
        m = tl.fma(tl.zeros_like(u) + one_minus_beta_m, u, beta_m * old)  # [HEIGHT, WIDTH]
        largest = tl.max(bits_of(m) & 0x7FFFFFFF, axis=1)  # [HEIGHT], bits of |m|
        not_finite = largest >= 0x7F800000  # [HEIGHT]
        zero = largest < 0x03800000  # [HEIGHT], |m| < 2^-120
        a = tl.where(not_finite | zero, 127.0, largest.to(tl.float32, bitcast=True))  # [HEIGHT]
        # a block with a NaN or an infinity gets the scale NaN and codes 1, so all of it reads NaN
        s = tl.where(not_finite, float("nan"), tl.where(zero, 0.0, tl.div_rn(a, tl.zeros_like(a) + 127.0)))  # [HEIGHT]
        inverse = tl.where(zero, 0.0, tl.div_rn(tl.zeros_like(a) + 127.0, a))  # [HEIGHT]
        # adding 1.5 2^23 rounds to an integer, ties to even
        code = (tl.where(not_finite[:, None], 0.0, m) * inverse[:, None] + 12582912.0) - 12582912.0  # [HEIGHT, WIDTH]
        tl.store(pointers, tl.where(not_finite[:, None], 1.0, code).to(tl.int8), mask=mask)  # [HEIGHT, WIDTH]
        tl.store(scale_pointers, s, mask=row_mask)  # [HEIGHT]
    return m


@triton.jit
def moved(w, m, lr, decay_factor):
    """decay_factor w - lr m, [HEIGHT, WIDTH]: w decay_factor is rounded first, and then an fma in fp32, or a product
    and a difference in fp64."""
    if w.dtype == tl.float64:
        out = w * decay_factor - lr * m.to(tl.float64)  # [HEIGHT, WIDTH]
    else:
        minus_lr = -1.0 * lr.to(tl.float32)  # Triton computes -lr as 0 - lr, which is +0 for lr = 0, not -0
        out = tl.fma(tl.broadcast_to(minus_lr, w.shape), m, w * decay_factor.to(tl.float32))  # [HEIGHT, WIDTH]
    return out
