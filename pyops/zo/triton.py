"""Triton kernels of the zeroth-order family, and their launchers, which take the operators' calls.

A program takes one tile: TILE consecutive *logical* indices, which are indices in the whole tensor and not in a shard.
The first one is a multiple of TILE, so no two tiles share a Philox block, whatever a shard's offset. The tensors of a
call lie in a table on the device: one launch serves a whole model.
"""

# Triton reads annotations of kernels as its own types
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from leanops.common.triton import find_row, round_to, widen
from leanops.common.upload import float64_bits, to_device
from leanops.zo import plan
from leanops.zo.calls import Axpy, AxpyInto, Linear, NoiseInPlace, NoiseSum
from leanops.zo.plan import Pair
from leanops.zo.triton_linear import linear
from leanops.zo.triton_lowrank import low_rank_update
from leanops.zo.triton_lowrank import tile_of as low_rank_tile_of
from leanops.zo.triton_noise import accumulate, noise


def tile_of(dtype: torch.dtype, distribution: str, terms: int) -> int:
    """Elements of a tile: 16 for each of 128 threads, or 32 where registers allow."""
    return 4096 if distribution == "rademacher" and dtype != torch.float64 and terms == 1 else 2048


_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _tile(
    out, source, start, numel, logical, tensor_id, seeds, coeffs, decays, terms, decay_count, seed, coeff, decay,
    IN_ORDER: tl.constexpr, INLINE: tl.constexpr, NOISE: tl.constexpr, DTYPE: tl.constexpr, WORK: tl.constexpr,
    IS_RADEMACHER: tl.constexpr, STOCHASTIC: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Update the tile whose element 0 has index ``start`` in its tensor and ``logical`` in the whole tensor.

    IN_ORDER: round after every term. INLINE: one term, with its numbers in ``seed``, ``coeff`` and ``decay``.
    NOISE: write z alone. MASKED: the tile reaches beyond the tensor, so ``start`` may be negative.
    """
    index = start + tl.arange(0, TILE)  # [TILE]
    inside = (index >= 0) & (index < numel)  # [TILE]
    rounding_seed = seed if INLINE else tl.load(seeds)
    if NOISE:
        acc = noise(rounding_seed, logical, tensor_id, TILE, IS_RADEMACHER).to(WORK)  # [TILE]
    else:
        if MASKED:
            acc = widen(tl.load(source + index, mask=inside, other=0.0), WORK)  # [TILE]
        else:
            acc = widen(tl.load(source + index), WORK)  # [TILE]
        if INLINE:
            acc = acc * (1.0 - decay).to(WORK)  # [TILE]
            c = coeff.to(WORK)
            z = noise(seed, logical, tensor_id, TILE, IS_RADEMACHER)  # [TILE]
            acc = accumulate(acc, c, z)  # [TILE]
        else:
            if not IN_ORDER:
                acc = acc * (1.0 - tl.load(decays)).to(WORK)  # [TILE]
            for k in range(terms):
                term_seed = tl.load(seeds + k)
                c = tl.load(coeffs + k).to(WORK)
                if IN_ORDER:
                    d = tl.load(decays + tl.where(decay_count > 1, k, 0))
                    acc = acc * (1.0 - d).to(WORK)  # [TILE]
                z = noise(term_seed, logical, tensor_id, TILE, IS_RADEMACHER)  # [TILE]
                acc = accumulate(acc, c, z)  # [TILE]
                if IN_ORDER:
                    acc = widen(round_to(acc, term_seed, logical, tensor_id, DTYPE, STOCHASTIC, TILE), WORK)  # [TILE]
    rounded = round_to(acc, rounding_seed, logical, tensor_id, DTYPE, STOCHASTIC and not IN_ORDER, TILE)  # [TILE]
    if MASKED:
        tl.store(out + index, rounded, mask=inside)  # [TILE]
    else:
        tl.store(out + index, rounded)  # [TILE]


@triton.jit(do_not_specialize=["tensors", "terms", "decay_count", "seed", "coeff_bits", "decay_bits"])
def update(
    table, tensors, seeds, coeffs, decays, terms, decay_count,
    seed: tl.int64, coeff_bits: tl.int64, decay_bits: tl.int64,
    IN_ORDER: tl.constexpr, INLINE: tl.constexpr, NOISE: tl.constexpr, DTYPE: tl.constexpr, WORK: tl.constexpr,
    IS_RADEMACHER: tl.constexpr, STOCHASTIC: tl.constexpr, TILE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One tile of one tensor of ``table``, whose rows are ``plan.Row``s. ALIGNED: a whole tile starts on 16 bytes."""
    tile = tl.program_id(0).to(tl.int64)
    row = find_row(table, tensors, tile, 7, 4)  # out, in, offset, numel, first tile, tensor id, columns
    out = tl.load(row).to(tl.pointer_type(DTYPE))
    source = tl.load(row + 1).to(tl.pointer_type(DTYPE))
    offset = tl.load(row + 2)
    numel = tl.load(row + 3)
    tensor_id = tl.load(row + 5)
    logical = (offset // TILE + tile - tl.load(row + 4)) * TILE
    start = logical - offset
    seed = seed.to(tl.int64)
    coeff = coeff_bits.to(tl.int64).to(tl.float64, bitcast=True)
    decay = decay_bits.to(tl.int64).to(tl.float64, bitcast=True)
    if (start >= 0) & (start + TILE <= numel):
        if ALIGNED:
            out = tl.multiple_of(out, 16)
            source = tl.multiple_of(source, 16)
            start = tl.multiple_of(start, 16)
        _tile(
            out, source, start, numel, logical, tensor_id, seeds, coeffs, decays, terms, decay_count,
            seed, coeff, decay, IN_ORDER, INLINE, NOISE, DTYPE, WORK, IS_RADEMACHER, STOCHASTIC, TILE, False,
        )  # fmt: skip
    else:
        _tile(
            out, source, start, numel, logical, tensor_id, seeds, coeffs, decays, terms, decay_count,
            seed, coeff, decay, IN_ORDER, INLINE, NOISE, DTYPE, WORK, IS_RADEMACHER, STOCHASTIC, TILE, True,
        )  # fmt: skip


_tables: OrderedDict[tuple[Any, ...], tuple[Tensor, int, bool]] = OrderedDict()


def _table(pairs: Sequence[Pair], tile: plan.Tile, device: torch.device) -> tuple[Tensor, int, bool]:
    """(table on the device, tiles, whether whole tiles start on 16 bytes), from a cache of the last 64 tables."""
    rows, tiles = plan.table(pairs, tile)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (tuple(rows), pairs[0].target.dtype, tile, device, stream)
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if not capturing and (known := _tables.pop(key, None)) is not None:  # atomic, as the next line
        _tables[key] = known
        return known
    size = pairs[0].target.element_size()
    aligned = all(r.out % 16 == r.source % 16 == r.offset * size % 16 == 0 and r.offset % 16 == 0 for r in rows)
    value = (to_device(torch.tensor(rows, dtype=torch.int64, device="cpu"), device), tiles, aligned)
    if not capturing:  # a graph uploads its own table at every replay
        _tables[key] = value
        while len(_tables) > 64:
            _tables.popitem(last=False)
    return value


def _on_device(values: Tensor, device: torch.device) -> Tensor:
    """The values, contiguous and on the device."""
    dense = values.contiguous()
    return dense if dense.device == device else to_device(dense, device)


def _launch(pairs: Sequence[Pair], call: NoiseInPlace | NoiseSum) -> None:
    if isinstance(call, NoiseInPlace):
        seeds, coeffs, decays, rounding, sequential = call.seed, None, None, "nearest", False
    else:
        seeds, coeffs, decays, rounding, sequential = (
            call.seeds, call.coeffs, call.decays, call.rounding, call.sequential
        )  # fmt: skip
    like = pairs[0].target
    tile = tile_of(like.dtype, call.distribution, seeds.numel())
    table, tiles, aligned = _table(pairs, tile, like.device)
    terms = seeds.numel()
    inline = terms == 1 and all(v is None or v.device.type == "cpu" for v in (seeds, coeffs, decays))
    numbers = [seeds, coeffs, decays]
    if inline:
        pointers = [table, table, table]
        scalars = (
            int(seeds[0]),
            float64_bits(0.0 if coeffs is None else float(coeffs[0])),
            float64_bits(0.0 if decays is None else float(decays[0])),
        )
    else:
        pointers = [table if v is None else _on_device(v, like.device) for v in numbers]
        scalars = (0, 0, 0)
    update[(tiles,)](
        table,
        len(pairs),
        *pointers,
        terms,
        1 if decays is None else decays.numel(),
        *scalars,
        IN_ORDER=sequential and terms > 1,
        INLINE=inline,
        NOISE=coeffs is None,
        DTYPE=_DTYPE[like.dtype],
        WORK=tl.float64 if like.dtype == torch.float64 else tl.float32,
        IS_RADEMACHER=call.distribution == "rademacher",
        STOCHASTIC=rounding == "stochastic" and like.dtype.itemsize == 2,
        TILE=tile,
        ALIGNED=aligned,
        num_warps=4,
        enable_fp_fusion=False,
    )


def _launch_low_rank(pairs: Sequence[Pair], noise: NoiseSum, right_seeds: Tensor) -> None:
    """One launch for each shape of tile and each alignment."""
    by_tile: dict[tuple[tuple[int, int], bool], list[Pair]] = {}
    for p in pairs:
        by_tile.setdefault((low_rank_tile_of(p.columns), p.columns % 8 == 0), []).append(p)
    like, terms = pairs[0].target, noise.seeds.numel()
    pointers = [_on_device(v, like.device) for v in (noise.seeds, right_seeds, noise.coeffs, noise.decays)]
    for ((rows, across), aligned), part in by_tile.items():
        table, tiles, _ = _table(part, (rows, across), like.device)
        low_rank_update[(tiles,)](
            table, len(part), *pointers, terms, noise.decays.numel(), noise.rank,
            IN_ORDER=noise.sequential and terms > 1, DTYPE=_DTYPE[like.dtype],
            WORK=tl.float64 if like.dtype == torch.float64 else tl.float32,
            STOCHASTIC=noise.rounding == "stochastic" and like.dtype.itemsize == 2, ALIGNED=aligned,
            ROWS=rows, COLS=across, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def zo_noise_(call: NoiseInPlace) -> None:
    if call.out.numel() == 0:
        return
    with torch.cuda._DeviceGuard(call.out.get_device()), plan.dense(call.out) as target:
        _launch([Pair(target, target, call.tensor_id, call.offset)], call)


def zo_axpy_into_(call: AxpyInto) -> None:
    if not call.out:
        return
    with torch.cuda._DeviceGuard(call.out[0].get_device()), plan.launches(call) as launches:
        for pairs in launches:
            if pairs[0].columns and call.noise.right_seeds is not None:
                _launch_low_rank(pairs, call.noise, call.noise.right_seeds)
            else:
                _launch(pairs, call.noise)


def zo_axpy_(call: Axpy) -> None:
    zo_axpy_into_(call.into())


def zo_linear(call: Linear) -> tuple[Tensor, Tensor]:
    x, weight = call.x, call.weight
    with torch.cuda._DeviceGuard(x.get_device()):
        if x.dtype == torch.float64:  # only tests use it: not worth a kernel
            z = torch.empty_like(weight, memory_format=torch.contiguous_format)
            zo_noise_(NoiseInPlace(z, call.seed, call.tensor_id, call.offset, call.distribution))
            minus = x if call.x_minus is None else call.x_minus
            plus_minus = ((x, weight + call.scale * z), (minus, weight - call.scale * z))
            y_plus, y_minus = (torch.nn.functional.linear(a, w, call.bias) for a, w in plus_minus)
            return y_plus, y_minus
        return linear(call._replace(seed=_on_device(call.seed, x.device)))
