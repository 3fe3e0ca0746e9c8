"""axpy of matrices with low-rank noise in Triton: z = U V^T.

A program takes ROWS x COLS elements of one matrix, and computes its rows of U and of V itself.
"""

# Triton reads annotations of kernels as its own types
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from leanops.common import streams
from leanops.common.triton import find_row, round_by, rounding_bits, widen
from leanops.zo.triton_noise import accumulate, gaussian_at

LEFT = tl.constexpr(streams.LEFT)
RIGHT = tl.constexpr(streams.RIGHT)
_ELEMENTS = 1024  # elements of a tile: 8 for each of 128 threads


def tile_of(columns: int) -> tuple[int, int]:
    """(rows, columns) of a tile. A square needs the fewest rows of U and V.

    Registers of a thread on sm_90 (bf16, in order) by rows x columns: 32x32 154, 16x64 233, 32x64 238, and 16x128 255
    with spills.
    """
    across = min(32, triton.next_power_of_2(columns))
    return _ELEMENTS // across, across


@triton.jit(do_not_specialize=["tensors", "terms", "decay_count", "rank"])
def low_rank_update(
    table, tensors, seeds, right_seeds, coeffs, decays, terms, decay_count, rank,
    IN_ORDER: tl.constexpr, DTYPE: tl.constexpr, WORK: tl.constexpr, STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """One tile of one matrix of ``table``, whose rows are ``plan.Row``s. ALIGNED: ``columns`` is a multiple of 8."""
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
    index = (rows * columns - offset)[:, None] + cols[None, :]  # [ROWS, COLS]
    inside = (cols < columns)[None, :] & (index >= 0) & (index < numel)  # [ROWS, COLS]
    acc = widen(tl.load(source + index, mask=inside, other=0.0), WORK)  # [ROWS, COLS]
    if not IN_ORDER:
        acc = acc * (1.0 - tl.load(decays)).to(WORK)  # [ROWS, COLS]
    for k in range(terms):
        seed = tl.load(seeds + k)
        right_seed = tl.load(right_seeds + k)
        if IN_ORDER:
            acc = acc * (1.0 - tl.load(decays + tl.where(decay_count > 1, k, 0))).to(WORK)  # [ROWS, COLS]
        u = gaussian_at(seed, rows * rank, tensor_id, LEFT)  # [ROWS]
        v = gaussian_at(right_seed, cols * rank, tensor_id, RIGHT)  # [COLS]
        z = u[:, None] * v[None, :]  # [ROWS, COLS]
        for p in range(1, rank):
            u = gaussian_at(seed, rows * rank + p, tensor_id, LEFT)  # [ROWS]
            v = gaussian_at(right_seed, cols * rank + p, tensor_id, RIGHT)  # [COLS]
            z = tl.fma(tl.broadcast_to(u[:, None], [ROWS, COLS]), tl.broadcast_to(v[None, :], [ROWS, COLS]), z)
        acc = accumulate(acc, tl.load(coeffs + k).to(WORK), z)  # [ROWS, COLS]
        if IN_ORDER:
            r = 0
            if STOCHASTIC:
                r = rounding_bits(seed, rows * columns + column, tensor_id, ALIGNED, ROWS, COLS)  # [ROWS, COLS]
            acc = widen(round_by(acc, r, DTYPE, STOCHASTIC), WORK)  # [ROWS, COLS]
    r = 0
    if STOCHASTIC and not IN_ORDER:
        r = rounding_bits(tl.load(seeds), rows * columns + column, tensor_id, ALIGNED, ROWS, COLS)  # [ROWS, COLS]
    tl.store(out + index, round_by(acc, r, DTYPE, STOCHASTIC and not IN_ORDER), mask=inside)  # [ROWS, COLS]
