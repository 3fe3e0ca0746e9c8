"""Functions that the families' Triton kernels share: Philox, rounding, and the search in a table of tensors.

A definition rounds some products and sums separately, and these must not be fused. So every kernel that uses these
functions is launched with ``enable_fp_fusion=False``, and writes a fused operation as ``tl.fma``.
"""

# Triton reads annotations of kernels as its own types
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from leanops.common import streams

# Triton's interpreter truncates to bf16 and flushes bf16 subnormals; `narrow` and `widen` work on the bits there
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
ROUNDING = tl.constexpr(streams.ROUNDING)


@triton.jit
def philox(seed, block, tensor_id, STREAM: tl.constexpr):
    """Philox4x32-10 of int64 block numbers, [...]: four uint32 words, each [...]."""
    k0 = seed.to(tl.uint64).to(tl.uint32)
    k1 = (seed.to(tl.uint64) >> 32).to(tl.uint32)
    c0 = block.to(tl.uint64).to(tl.uint32)  # [...]
    c1 = (block.to(tl.uint64) >> 32).to(tl.uint32)  # [...]
    c2 = tl.zeros_like(c0) + tensor_id.to(tl.uint32)  # [...]
    c3 = tl.zeros_like(c0) + STREAM  # [...]
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53  # [...]
        p1 = c2.to(tl.uint64) * 0xCD9E8D57  # [...]
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = p0.to(tl.uint32)
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def select_word(number, w0, w1, w2, w3):
    """The word with this number, 0 to 3. All arguments and the result are [...]."""
    return tl.where(number < 2, tl.where(number == 0, w0, w1), tl.where(number == 2, w2, w3))  # [...]


@triton.jit
def in_order(x0, x1, x2, x3):
    """Interleave four tensors [..., n] to [..., n, 4]."""
    pairs = tl.join(tl.join(x0, x2), tl.join(x1, x3))  # [..., n, 2, 2]
    return tl.reshape(pairs, x0.shape + [4])  # noqa: RUF005  [..., n, 4]


@triton.jit
def halves(w0, w1, w2, w3):
    """Split four words [..., n] into 16-bit halves [..., n, 4, 2], the low half first."""
    words = in_order(w0, w1, w2, w3)  # [..., n, 4]
    return tl.join(words & 0xFFFF, words >> 16)  # [..., n, 4, 2]


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """x [...] rounded to DTYPE, ties to even."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)  # [...]
        even = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), bits | 0x400000)  # [...]
        y = (even >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)  # [...]
    else:
        y = x.to(DTYPE)  # [...]
    return y


@triton.jit
def widen(x, DTYPE: tl.constexpr):
    """x [...] converted to DTYPE."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        y = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)  # [...]
    else:
        y = x.to(DTYPE)  # [...]
    return y


@triton.jit
def find_row(table, tensors, tile, WORDS: tl.constexpr, FIRST: tl.constexpr):
    """Pointer to the table row of a tile's tensor. A row has WORDS words; word FIRST is the tensor's first tile.

    Binary search for the last of ``tensors`` rows whose first tile is at most ``tile``. Everything is a scalar.
    """
    low = 0
    high = tensors
    while high - low > 1:
        middle = (low + high) // 2
        starts_before = tl.load(table + middle * WORDS + FIRST) <= tile
        low = tl.where(starts_before, middle, low)
        high = tl.where(starts_before, high, middle)
    return table + low * WORDS


@triton.jit
def rounding_bits(seed, start, tensor_id, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """16 random bits for each of COLS elements from each ``start`` [ROWS] on: [ROWS, COLS].

    ALIGNED: every start is the first element of a Philox block, a multiple of 8.
    """
    if ALIGNED and COLS >= 8:
        block = (start[:, None] >> 3) + tl.arange(0, COLS // 8)[None, :]  # [ROWS, COLS/8]
        w0, w1, w2, w3 = philox(seed, block, tensor_id, ROUNDING)  # [ROWS, COLS/8] each
        r = tl.reshape(halves(w0, w1, w2, w3), [ROWS, COLS])  # [ROWS, COLS/8, 4, 2] -> [ROWS, COLS]
    else:
        index = start[:, None] + tl.arange(0, COLS)[None, :]  # [ROWS, COLS]
        w0, w1, w2, w3 = philox(seed, index >> 3, tensor_id, ROUNDING)  # [ROWS, COLS] each
        w = select_word((index >> 1) & 3, w0, w1, w2, w3)  # [ROWS, COLS]
        r = tl.where((index & 1) == 0, w & 0xFFFF, w >> 16)  # [ROWS, COLS]
    return r


@triton.jit
def round_to(acc, seed, logical, tensor_id, DTYPE: tl.constexpr, STOCHASTIC: tl.constexpr, TILE: tl.constexpr):
    """acc [TILE] rounded once to DTYPE: ties to even, or stochastically for the 16-bit types.

    ``logical``: index of element 0 in the whole tensor, a multiple of 8.
    """
    r = 0
    if STOCHASTIC and (tl.bfloat16 == DTYPE or tl.float16 == DTYPE):
        block = logical // 8 + tl.arange(0, TILE // 8)  # [TILE/8]
        w0, w1, w2, w3 = philox(seed, block, tensor_id, ROUNDING)  # [TILE/8] each
        r = tl.reshape(halves(w0, w1, w2, w3), [TILE])  # [TILE/8, 4, 2] -> [TILE]
    return round_by(acc, r, DTYPE, STOCHASTIC)  # [TILE]


@triton.jit
def round_by(acc, r, DTYPE: tl.constexpr, STOCHASTIC: tl.constexpr):
    """acc [...] rounded once to DTYPE: ties to even, or for the 16-bit types by 16 random bits r [...]."""
    if STOCHASTIC and (tl.bfloat16 == DTYPE or tl.float16 == DTYPE):
        bits = acc.to(tl.uint32, bitcast=True)  # [...]
        magnitude = bits & 0x7FFFFFFF  # [...]
        finite = magnitude < 0x7F800000  # [...]
        if tl.bfloat16 == DTYPE:
            up = ((bits + r) & 0xFFFF0000).to(tl.float32, bitcast=True)  # [...]
            out = narrow(tl.where(finite, up, acc), DTYPE)  # [...]
        else:
            up = ((bits + (r >> 3)) & 0xFFFFE000).to(tl.float32, bitcast=True)  # [...]
            normal = tl.where(finite, up, acc).to(DTYPE).to(tl.uint16, bitcast=True)  # [...]
            # below 2^-14 the spacing of fp16 is constant, 2^-24: round a fixed-point number with 16 fraction bits
            small = magnitude < 0x38800000  # [...]
            fixed = tl.where(small, magnitude, 0).to(tl.float32, bitcast=True) * 1099511627776.0  # [...], times 2^40
            code = ((fixed.to(tl.uint32) + r) >> 16) | ((bits >> 16) & 0x8000)  # [...]
            out = tl.where(small, code.to(tl.uint16), normal).to(DTYPE, bitcast=True)  # [...]
    else:
        out = narrow(acc, DTYPE)  # [...]
    return out
