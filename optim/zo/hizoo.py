r"""HiZOO's directions: noise divided by the root of a curvature that every element has of its own.

With h, one number an element, 1 at the start (HiZOO's diagonal of the inverse of Sigma):

    q_k = z_k / sqrt(h),    c_k = |L(theta + eps q_k) + L(theta - eps q_k) - 2 L(theta)| / (2 eps^2)
    h <- h ((1 - alpha) + (alpha / n) sum_k c_k z_k^2)

In h's dtype, fp32 (fp64 for fp64), every operation rounded by itself, none but additions, products, quotients and
roots, so that a log replays to the same bits anywhere. What lies in between is as large as a slice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from leanops.common import exact
from leanops.common.dtypes import wide_dtype
from leanops.optim.zo import update
from leanops.optim.zo.directions import Seed, left
from leanops.optim.zo.rounding import write_
from leanops.optim.zo.slots import Slot, by_device
from leanops.zo import zo_axpy_

_SLICE = 1 << 17  # elements; three times as many numbers stay in a cache


def flat(slot: Slot) -> Tensor:
    """The curvature before the first step."""
    with torch.inference_mode(False):  # later steps may be outside of it
        return torch.ones(slot.local.shape, dtype=wide_dtype(slot.local), device=slot.local.device)


def perturb_into_(outs: Sequence[Tensor], slots: Sequence[Slot], seed: Seed, scale: float) -> None:
    """out <- round(p + scale z / sqrt(h)); ``outs`` may be the slots' own memory."""
    if scale == 0.0:
        for out, slot in zip(outs, slots, strict=True):
            out.copy_(slot.local)
        return
    for piece, step in _scaled(outs, slots, [seed], [scale]):
        piece.out.copy_(step.add_(piece.slot.local))


def step_(
    slots: Sequence[Slot],
    momenta: Sequence[Tensor],
    seeds: Sequence[Seed],
    scalars: Sequence[float],
    lr: float,
    beta: float,
    decay: float,
    smoothing: float,
    rounding: str,
) -> None:
    """The curvature learns from this step, then the weights move: theta <- (1 - decay) theta - lr m.

    ``scalars`` are the estimates g_k and then the c_k; m is (1/n) sum_k g_k q_k without momentum.
    """
    n = len(seeds)
    learn_(slots, seeds, scalars[n:], smoothing)
    if beta:
        accumulate_(slots, momenta, seeds, scalars[:n], beta)
        if lr:
            update.descend_(slots, momenta, lr, decay, rounding, seeds[0].left)
    elif lr:
        descend_(slots, seeds, [-(lr / n) * g for g in scalars[:n]], decay, rounding)


def descend_(
    slots: Sequence[Slot], seeds: Sequence[Seed], coeffs: Sequence[float], decay: float, rounding: str
) -> None:
    """p <- round((1 - decay) p + sum_k c_k z_k / sqrt(h))."""
    for part in by_device(slots):
        for piece, step in _scaled([s.local for s in part], part, seeds, coeffs):
            kept = piece.out.to(step.dtype, copy=True).mul_(1.0 - decay)
            write_(piece.slot, step.add_(kept), rounding, seeds[0].left)


def accumulate_(
    slots: Sequence[Slot], momenta: Sequence[Tensor], seeds: Sequence[Seed], scalars: Sequence[float], beta: float
) -> None:
    """m <- beta m + (1/n) sum_k g_k z_k / sqrt(h)."""
    moved = [s._replace(local=m) for s, m in zip(slots, momenta, strict=True)]
    descend_(moved, seeds, [g / len(scalars) for g in scalars], 1.0 - beta, "nearest")


def learn_(slots: Sequence[Slot], seeds: Sequence[Seed], curvatures: Sequence[float], smoothing: float) -> None:
    """h <- h ((1 - alpha) + (alpha / n) sum_k c_k z_k^2)."""
    for part in by_device(slots):
        for pieces in _batches([s.local for s in part], part):
            factors = [torch.full_like(piece.h, 1.0 - smoothing) for piece in pieces]
            for seed, c in zip(seeds, curvatures, strict=True):
                for factor, z in zip(factors, _sums(pieces, [seed], [1.0]), strict=True):
                    factor.add_(z.square_().mul_(smoothing * c / len(seeds)))
            for piece, factor in zip(pieces, factors, strict=True):
                piece.h.mul_(factor)


class _Piece(NamedTuple):
    """A slice of a slot, of its curvature, and of what is written."""

    out: Tensor
    slot: Slot
    h: Tensor


def _scaled(
    outs: Sequence[Tensor], slots: Sequence[Slot], seeds: Sequence[Seed], coeffs: Sequence[float]
) -> Iterator[tuple[_Piece, Tensor]]:
    """Slices of the tensors of one device, and sum_k c_k z_k / sqrt(h) of each."""
    for pieces in _batches(outs, slots):
        for piece, total in zip(pieces, _sums(pieces, seeds, coeffs), strict=True):
            yield piece, total.div_(exact.sqrt(piece.h))


def _sums(pieces: Sequence[_Piece], seeds: Sequence[Seed], coeffs: Sequence[float]) -> list[Tensor]:
    """sum_k c_k z_k."""
    sums = [torch.zeros_like(piece.h) for piece in pieces]
    ids, offsets = [p.slot.tensor_id for p in pieces], [p.slot.offset for p in pieces]
    zo_axpy_(sums, left(seeds), list(coeffs), tensor_ids=ids, offsets=offsets)
    return sums


def _batches(outs: Sequence[Tensor], slots: Sequence[Slot]) -> Iterator[list[_Piece]]:
    """Small tensors together, large ones in slices: about _SLICE elements at a time."""
    batch: list[_Piece] = []
    size = 0
    for out, slot in zip(outs, slots, strict=True):
        for piece in _slices(out, slot):
            batch.append(piece)
            size += piece.out.numel()
            if size >= _SLICE:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _slices(out: Tensor, slot: Slot) -> Iterator[_Piece]:
    h = slot.curvature
    assert h is not None
    if not (out.is_contiguous() and slot.local.is_contiguous() and h.is_contiguous()):
        yield _Piece(out, slot, h)
        return
    out, local, h = out.view(-1), slot.local.view(-1), h.view(-1)
    for start in range(0, out.numel(), _SLICE):
        part = slice(start, start + _SLICE)
        yield _Piece(out[part], slot._replace(local=local[part], offset=slot.offset + start), h[part])
