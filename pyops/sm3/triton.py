"""Triton kernel of SM3, and its launcher, which takes the operator's call.

The tensors of a call lie in a table on the device, as matrices that are cut into tiles: one launch serves a whole list.
A program takes one tile, HEIGHT rows at a time, and writes parameters and momenta at once. It gathers the new maxima in
a second buffer, because other tiles still read the old accumulators. It uses integer atomics on the bits of nu >= 0:
they are exact, and their order does not matter. The program that finishes a tensor's last tile copies the maxima over
the accumulators, and leaves zeros for the next call.
"""

# Triton reads annotations of kernels as its own types
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from leanops.common.triton import find_row, round_by, rounding_bits, widen
from leanops.common.upload import float64_bits, to_device
from leanops.sm3 import plan
from leanops.sm3.calls import Step
from leanops.sm3.triton_update import average, bits_of, min_or_nan, moved, quotient

# A tile is STEPS times HEIGHT rows of WIDTH columns: a thread has 8 elements at a time. WIDTH is that of an int8
# momentum's blocks. Matrices of up to NARROW_WIDTH columns have NARROW_HEIGHT and NARROW_WIDTH instead.
TILE_SIZES = {"STEPS": 16, "HEIGHT": 4, "WIDTH": 256, "NARROW_HEIGHT": 32, "NARROW_WIDTH": 32}
LAUNCH = {"num_warps": 4, "maxnreg": 255}  # without maxnreg, ptxas spills so that a third block fits

# words of a tensor's row in the table: plan.Row, FORM, one of the constants below, and PLACE among the parameters
(PARAM, GRAD, COVER, MOMENTA, SCALE, MAXIMA, ROWS, COLS, NUMEL, OFFSET, FIRST, TILES, SHAPE, TENSOR_ID, RANK, SPLIT,
 FORM, PLACE, WORDS) = map(tl.constexpr, range(19))  # fmt: skip
IS_WIDE, IS_UNALIGNED, IS_NARROW, IS_FLAT = map(tl.constexpr, range(4))

_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _least_cover(cover, shape, first, last, index, mask):
    """The smallest accumulator at each index [N] of the flattened axes ``first`` to ``last - 1``: [N]."""
    axis = 0
    start = tl.zeros([], tl.int64)
    while axis < last:
        start += tl.load(shape + axis)
        axis += 1
    c = tl.full(index.shape, float("inf"), tl.float32)  # [N]
    axis = last - 1
    while axis > first:
        n = tl.load(shape + axis)
        start -= n
        c = min_or_nan(c, tl.load(cover + start + index % n, mask=mask, other=0.0))  # [N]
        index = index // n  # [N]
        axis -= 1
    start -= tl.load(shape + first)
    return min_or_nan(c, tl.load(cover + start + index, mask=mask, other=0.0))  # [N]


@triton.jit
def _raise_maxima(maxima, shape, first, last, index, top, mask):
    """Raise the maxima at each index [N] of the flattened axes ``first`` to ``last - 1`` to ``top`` [N]."""
    axis = 0
    start = tl.zeros([], tl.int64)
    while axis < last:
        start += tl.load(shape + axis)
        axis += 1
    axis = last - 1
    while axis > first:
        n = tl.load(shape + axis)
        start -= n
        pointers = maxima + start + index % n  # [N]
        # many indices share an accumulator, so most maxima are high enough: a load spares the atomic
        is_higher = tl.load(pointers, mask=mask, other=0, volatile=True) < top  # [N]
        tl.atomic_max(pointers, top, mask=mask & is_higher, sem="relaxed")  # [N]
        index = index // n  # [N]
        axis -= 1
    start -= tl.load(shape + first)
    tl.atomic_max(maxima + start + index, top, mask=mask & (top != 0), sem="relaxed")  # [N]


@triton.jit
def _tile(
    slot, shape, number, seed, lr, decay_factor, grad_factor, averages, couples, coupled_decay, eps, beta,
    one_minus_beta, beta_m, one_minus_beta_m,
    DTYPE: tl.constexpr, MOMENTUM: tl.constexpr, OF_GRADIENT: tl.constexpr, STOCHASTIC: tl.constexpr,
    STEPS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, FLAT: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Update tile ``number`` of a tensor: STEPS times HEIGHT rows of WIDTH columns.

    FLAT: rank 0 or 1, so every element has its own accumulator. averages: beta < 1. couples: the decay is part of the
    gradient. OF_GRADIENT: the momentum is of the gradient, before the division.
    """
    param = tl.load(slot + PARAM).to(tl.pointer_type(DTYPE))
    grad = tl.load(slot + GRAD).to(tl.pointer_type(DTYPE))
    cover = tl.load(slot + COVER).to(tl.pointer_type(tl.float32))
    momentum = tl.load(slot + MOMENTA)
    scale = tl.load(slot + SCALE)
    rows = tl.load(slot + ROWS)
    cols = tl.load(slot + COLS)
    numel = tl.load(slot + NUMEL)
    offset = tl.load(slot + OFFSET)
    tensor_id = tl.load(slot + TENSOR_ID)
    rank = tl.load(slot + RANK).to(tl.int32)
    split = tl.load(slot + SPLIT).to(tl.int32)
    if ALIGNED:
        param = tl.multiple_of(param, 16)
        grad = tl.multiple_of(grad, 16)
        momentum = tl.multiple_of(momentum, 16)
        cols = tl.multiple_of(cols, 8)
        offset = tl.multiple_of(offset, 8)
    across = (cols + WIDTH - 1) // WIDTH
    first_row = number // across * (STEPS * HEIGHT)
    first_col = number % across * WIDTH
    col = first_col + tl.arange(0, WIDTH)  # [WIDTH]
    in_cols = col < cols  # [WIDTH]
    if not FLAT:
        maxima = tl.load(slot + MAXIMA).to(tl.pointer_type(tl.uint32)) + 1
        col_cover = _least_cover(cover, shape, split, rank, col, in_cols)  # [WIDTH]
        top = tl.zeros([HEIGHT, WIDTH], tl.uint32)  # [HEIGHT, WIDTH], bits of the largest nu of all steps
    for step in range(tl.minimum(STEPS, (rows - first_row + HEIGHT - 1) // HEIGHT).to(tl.int32)):
        row = first_row + step * HEIGHT + tl.arange(0, HEIGHT)  # [HEIGHT]
        in_rows = row < rows  # [HEIGHT]
        index = row[:, None] * cols + col[None, :]  # [HEIGHT, WIDTH]
        mask = in_rows[:, None] & in_cols[None, :]  # [HEIGHT, WIDTH]
        if FLAT:
            mask = mask & (index < numel)  # [HEIGHT, WIDTH]
        w = tl.load(param + index, mask=mask, other=0.0)  # [HEIGHT, WIDTH]
        w = widen(w, tl.float64 if tl.float64 == DTYPE else tl.float32)  # [HEIGHT, WIDTH]
        g = widen(tl.load(grad + index, mask=mask, other=0.0), tl.float32)  # [HEIGHT, WIDTH]
        g = g.to(tl.float32) * grad_factor  # [HEIGHT, WIDTH]
        if FLAT:
            c = tl.load(cover + index, mask=mask, other=0.0)  # [HEIGHT, WIDTH]
        else:
            row_cover = _least_cover(cover, shape, 0, split, row, in_rows)  # [HEIGHT]
            c = min_or_nan(row_cover[:, None], col_cover[None, :])  # [HEIGHT, WIDTH]
        if couples != 0:
            g = tl.fma(tl.zeros_like(g) + coupled_decay, w.to(tl.float32), g)  # [HEIGHT, WIDTH]
        if averages != 0:  # noqa: SIM108  `if` is a jump; a conditional expression computes both
            nu = tl.fma(tl.zeros_like(g) + one_minus_beta, g * g, beta * c)  # [HEIGHT, WIDTH]
        else:
            nu = tl.fma(g, g, c)  # [HEIGHT, WIDTH]
        m = g if OF_GRADIENT else quotient(g, nu, eps)  # [HEIGHT, WIDTH]
        if MOMENTUM != 0:
            block = row * ((cols + 255) // 256) + first_col // 256  # [HEIGHT]
            m = average(momentum, scale, index, block, mask, in_rows, m, beta_m, one_minus_beta_m, MOMENTUM)
        if OF_GRADIENT:
            m = quotient(m, nu, eps)  # [HEIGHT, WIDTH]
        w = moved(w, m, lr, decay_factor)  # [HEIGHT, WIDTH]
        random = 0
        if STOCHASTIC and (tl.bfloat16 == DTYPE or tl.float16 == DTYPE):
            start = offset + row * cols + first_col  # [HEIGHT]
            random = rounding_bits(seed, start, tensor_id, ALIGNED, HEIGHT, WIDTH)  # [HEIGHT, WIDTH]
        tl.store(param + index, round_by(w, random, DTYPE, STOCHASTIC), mask=mask)  # [HEIGHT, WIDTH]
        if FLAT:
            tl.store(cover + index, nu, mask=mask)  # [HEIGHT, WIDTH]
        else:
            step_top = bits_of(nu)  # [HEIGHT, WIDTH]
            top = tl.maximum(top, step_top)  # [HEIGHT, WIDTH]
            row_top = tl.max(step_top, axis=1)  # [HEIGHT]
            _raise_maxima(maxima, shape, 0, split, row, row_top, in_rows)
    if not FLAT:
        col_top = tl.max(top, axis=0)  # [WIDTH]
        _raise_maxima(maxima, shape, split, rank, col, col_top, in_cols)


@triton.jit
def _finish(slot, shape):
    """Count this tile. After a tensor's last tile, copy the maxima over the accumulators and zero them."""
    tl.debug_barrier()  # every thread has issued its atomics
    maxima = tl.load(slot + MAXIMA).to(tl.pointer_type(tl.uint32))
    if tl.atomic_add(maxima, 1, sem="acq_rel") == tl.load(slot + TILES) - 1:
        cover = tl.load(slot + COVER).to(tl.pointer_type(tl.float32))
        length = tl.zeros([], tl.int64)
        axis = tl.zeros([], tl.int64)
        while axis < tl.load(slot + RANK):
            length += tl.load(shape + axis)
            axis += 1
        for start in range(0, length, 1024):
            index = start + tl.arange(0, 1024)  # [1024]
            top = tl.load(maxima + 1 + index, mask=index < length, other=0, volatile=True)  # [1024]
            tl.store(cover + index, top.to(tl.float32, bitcast=True), mask=index < length)  # [1024]
            tl.store(maxima + 1 + index, tl.zeros_like(top), mask=index < length)  # [1024]
        tl.store(maxima, 0)


@triton.jit(do_not_specialize=[
    "tensors", "lr_bits", "decay_bits", "seed_value", "scale_value", "sign", "averages", "couples", "coupled_decay",
    "eps", "beta", "one_minus_beta", "beta_m", "one_minus_beta_m",
])  # fmt: skip
def step_kernel(
    table, tensors, lr, seed, grad_scale, found_inf, lr_factors, lr_bits: tl.int64, decay_bits: tl.int64,
    seed_value: tl.int64, scale_value, sign, averages, couples, coupled_decay, eps, beta, one_minus_beta, beta_m,
    one_minus_beta_m,
    LOAD_LR: tl.constexpr, LOAD_SEED: tl.constexpr, LOAD_SCALE: tl.constexpr, LOAD_FOUND_INF: tl.constexpr,
    LOAD_LR_FACTORS: tl.constexpr, DTYPE: tl.constexpr, MOMENTUM: tl.constexpr, OF_GRADIENT: tl.constexpr,
    STOCHASTIC: tl.constexpr, STEPS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    NARROW_HEIGHT: tl.constexpr, NARROW_WIDTH: tl.constexpr,
):  # fmt: skip
    """One tile of one tensor. LOAD_LR and its like: the number is on the device; otherwise it is an argument."""
    if LOAD_FOUND_INF:  # noqa: SIM102  `and` would load in any case
        if tl.load(found_inf) != 0.0:
            return
    tile = tl.program_id(0).to(tl.int64)
    slot = find_row(table, tensors, tile, WORDS, FIRST)
    shape = table + tl.load(slot + SHAPE)
    number = tile - tl.load(slot + FIRST)
    form = tl.load(slot + FORM)

    rate = tl.load(lr).to(tl.float64) if LOAD_LR else lr_bits.to(tl.int64).to(tl.float64, bitcast=True)
    key = tl.load(seed) if LOAD_SEED else seed_value.to(tl.int64)
    scale = tl.load(grad_scale) if LOAD_SCALE else scale_value
    grad_factor = sign * tl.div_rn(tl.full([1], 1.0, tl.float32), tl.full([1], scale, tl.float32))  # [1]
    grad_factor = tl.sum(grad_factor, axis=0)  # [1] -> scalar
    decay = decay_bits.to(tl.int64).to(tl.float64, bitcast=True)
    decay_factor = tl.where(decay == 0.0, 1.0, 1.0 - rate * decay)  # 1 without decay, even if rate is inf
    if LOAD_LR_FACTORS:
        rate = rate * tl.load(lr_factors + tl.load(slot + PLACE)).to(tl.float64)
    if form == IS_WIDE:
        _tile(
            slot, shape, number, key, rate, decay_factor, grad_factor, averages, couples, coupled_decay, eps, beta,
            one_minus_beta, beta_m, one_minus_beta_m, DTYPE, MOMENTUM, OF_GRADIENT, STOCHASTIC, STEPS, HEIGHT, WIDTH,
            False, True,
        )  # fmt: skip
    elif form == IS_UNALIGNED:
        _tile(
            slot, shape, number, key, rate, decay_factor, grad_factor, averages, couples, coupled_decay, eps, beta,
            one_minus_beta, beta_m, one_minus_beta_m, DTYPE, MOMENTUM, OF_GRADIENT, STOCHASTIC, STEPS, HEIGHT, WIDTH,
            False, False,
        )  # fmt: skip
    elif form == IS_NARROW:
        _tile(
            slot, shape, number, key, rate, decay_factor, grad_factor, averages, couples, coupled_decay, eps, beta,
            one_minus_beta, beta_m, one_minus_beta_m, DTYPE, MOMENTUM, OF_GRADIENT, STOCHASTIC, STEPS, NARROW_HEIGHT,
            NARROW_WIDTH, False, False,
        )  # fmt: skip
    else:
        _tile(
            slot, shape, number, key, rate, decay_factor, grad_factor, averages, couples, coupled_decay, eps, beta,
            one_minus_beta, beta_m, one_minus_beta_m, DTYPE, MOMENTUM, OF_GRADIENT, STOCHASTIC, STEPS, HEIGHT, WIDTH,
            True, False,
        )  # fmt: skip
    if form != IS_FLAT:
        _finish(slot, shape)


_tables: OrderedDict[tuple[Any, ...], tuple[Tensor, Tensor, int]] = OrderedDict()


def _tile_of(matrix: plan.Matrix, int8: bool) -> tuple[int, int]:
    height, width = (TILE_SIZES["NARROW_" * _is_narrow(matrix.cols) + side] for side in ("HEIGHT", "WIDTH"))
    return height * TILE_SIZES["STEPS"], width


def _is_narrow(cols: int) -> bool:
    return cols <= TILE_SIZES["NARROW_WIDTH"]


TILING = plan.Tiling(_tile_of, lambda tiles, rank: True, WORDS.value)


def _form(row: plan.Row) -> int:
    if row.rank < 2:
        form = IS_FLAT
    elif _is_narrow(row.cols):
        form = IS_NARROW
    else:
        is_aligned = (row.param | row.grad | row.momentum) % 16 == 0 == (row.cols | row.offset) % 8
        form = IS_WIDE if is_aligned else IS_UNALIGNED
    return int(form.value)


def _table(items: Sequence[plan.Item], device: torch.device) -> tuple[Tensor, Tensor, int]:
    """(table on the device, zeroed words for maxima, tiles), from a cache of the last 64 tables.

    A call may use the words of the call before it, because the kernel leaves zeros.
    """
    planned = plan.table(items, TILING)
    slots = [(*row, _form(row), item.place) for row, item in zip(planned.rows, items, strict=True)]
    cuda = device.type == "cuda"
    key = (tuple(slots), tuple(planned.sizes), device, torch.cuda.current_stream(device).cuda_stream if cuda else 0)
    capturing = cuda and torch.cuda.is_current_stream_capturing()
    if not capturing and (known := _tables.pop(key, None)) is not None:  # atomic, as the next line
        _tables[key] = known
        return known
    maxima = torch.zeros(planned.scratch, dtype=torch.int32, device=device)
    table = np.array(slots, dtype=np.int64)
    table[:, MAXIMA.value] = plan.addresses(table[:, MAXIMA.value], maxima.data_ptr())
    flat = torch.from_numpy(np.concatenate([table.ravel(), np.array(planned.sizes, dtype=np.int64)]))
    value = (to_device(flat, device), maxima, planned.tiles)
    if not capturing:  # a graph has its own words, and zeroes them at every replay
        _tables[key] = value
        while len(_tables) > 64:
            _tables.popitem(last=False)
    return value


def _on_device(value: Tensor | None) -> bool:
    """Whether the kernel can read a number itself. Numbers on the CPU travel as arguments."""
    return value is not None and value.device.type != "cpu"


def sm3_step_(call: Step) -> None:
    if not call.params:
        return
    lr, seed, grad_scale, found_inf, o = call.lr, call.seed, call.grad_scale, call.found_inf, call.options
    if found_inf is not None and not _on_device(found_inf) and found_inf.item() != 0:
        return
    first, factors = call.params[0], call.lr_factors
    if factors is not None and factors.device.type == "cpu":
        factors = to_device(factors, first.device)
    with torch.cuda._DeviceGuard(first.get_device()), plan.launches(call) as groups:
        for items in groups:
            p, m = items[0].param, items[0].momentum
            table, _keep, tiles = _table(items, first.device)
            step_kernel[(tiles,)](
                table,
                len(items),
                lr if _on_device(lr) else table,
                seed if _on_device(seed) else table,
                grad_scale if _on_device(grad_scale) else table,
                found_inf if _on_device(found_inf) else table,
                table if factors is None else factors,
                0 if _on_device(lr) else float64_bits(lr.item()),
                float64_bits(o.weight_decay if o.decoupled else 0.0),
                0 if _on_device(seed) else int(seed.item()),
                1.0 if grad_scale is None or _on_device(grad_scale) else grad_scale.item(),
                -1.0 if o.maximize else 1.0,
                int(o.beta != 1),
                int(not o.decoupled and o.weight_decay != 0),
                o.weight_decay,
                o.eps,
                o.beta,
                1.0 - o.beta,
                o.momentum,
                1.0 - o.momentum,
                LOAD_LR=_on_device(lr),
                LOAD_SEED=_on_device(seed),
                LOAD_SCALE=_on_device(grad_scale),
                LOAD_FOUND_INF=_on_device(found_inf),
                LOAD_LR_FACTORS=factors is not None,
                DTYPE=_DTYPE[p.dtype],
                MOMENTUM=plan.KINDS[None if m is None else m.dtype],
                OF_GRADIENT=o.average_gradient and m is not None,
                STOCHASTIC=o.stochastic_rounding and p.dtype.itemsize == 2,  # wider types ignore it
                **TILE_SIZES,
                **LAUNCH,
                enable_fp_fusion=False,
            )
