"""axpy with low-rank noise in Triton, z = U V^T, over matrices.

A program takes ROWS x COLS of one matrix, and makes U of those rows and V of those columns where they are used.
"""

# Triton reads annotations of kernels as types of its own
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from leanops.common import streams
from leanops.common.triton import find_row, round_by, rounding_bits, widen
from leanops.zo.triton_noise import accumulate, gaussian_at

LEFT = tl.constexpr(streams.LEFT)
RIGHT = tl.constexpr(streams.RIGHT)
_ELEMENTS = 1024  # of a tile of 128 threads


def tile_of(columns: int) -> tuple[int, int]:
    """Rows and columns of a tile: a square has the fewest lines of U and V. Registers a thread on sm_90, bf16 in order,
    by rows x columns: 32x32 154, 16x64 233, 32x64 238, 16x128 255 with spills."""
    across = min(32, triton.next_power_of_2(columns))
    return _ELEMENTS // across, across


@triton.jit(do_not_specialize=["tensors", "terms", "decay_count", "rank"])
def low_rank_update(
    table, tensors, seeds, right_seeds, coeffs, decays, terms, decay_count, rank,
    IN_ORDER: tl.constexpr, DTYPE: tl.constexpr, WORK: tl.constexpr, STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    row = find_row(table, tensors, tile, 7, 4)  # out, in, offset, numel, first tile, tensor id, columns
    out = tl.load(row).to(tl.pointer_type(DTYPE))
    source = tl.load(row + 1).to(tl.pointer_type(DTYPE))
    offset = tl.load(row + 2)
    numel = tl.load(row + 3)
    tile -= tl.load(row + 4)
    tensor_id = tl.load(row + 5)
    columns = tl.load(row + 6)
    across = tl.cdiv(columns, COLS)
    column = tile % across * COLS
    rows = (offset // columns // ROWS + tile // across) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    cols = column + tl.arange(0, COLS)  # [COLS]
    at = (rows * columns - offset)[:, None] + cols[None, :]  # [ROWS, COLS]
    inside = (cols < columns)[None, :] & (at >= 0) & (at < numel)
    acc = widen(tl.load(source + at, mask=inside, other=0.0), WORK)
    if not IN_ORDER:
        acc = acc * (1.0 - tl.load(decays)).to(WORK)
    for k in range(terms):
        seed = tl.load(seeds + k)
        right = tl.load(right_seeds + k)
        if IN_ORDER:
            acc = acc * (1.0 - tl.load(decays + tl.where(decay_count > 1, k, 0))).to(WORK)
        u = gaussian_at(seed, rows * rank, tensor_id, LEFT)
        v = gaussian_at(right, cols * rank, tensor_id, RIGHT)
        z = u[:, None] * v[None, :]
        for p in range(1, rank):
            u = gaussian_at(seed, rows * rank + p, tensor_id, LEFT)
            v = gaussian_at(right, cols * rank + p, tensor_id, RIGHT)
            z = tl.fma(tl.broadcast_to(u[:, None], [ROWS, COLS]), tl.broadcast_to(v[None, :], [ROWS, COLS]), z)
        acc = accumulate(acc, tl.load(coeffs + k).to(WORK), z)
        if IN_ORDER:
            r = 0
            if STOCHASTIC:
                r = rounding_bits(seed, rows * columns + column, tensor_id, ALIGNED, ROWS, COLS)
            acc = widen(round_by(acc, r, DTYPE, STOCHASTIC), WORK)
    r = 0
    if STOCHASTIC and not IN_ORDER:
        r = rounding_bits(tl.load(seeds), rows * columns + column, tensor_id, ALIGNED, ROWS, COLS)
    tl.store(out + at, round_by(acc, r, DTYPE, STOCHASTIC and not IN_ORDER), mask=inside)
