"""SM3 in pure PyTorch: the specification that every kernel is compared with, bit for bit.

``sm3/1`` defines one step as a fixed sequence of fp32 operations, each rounded to nearest even, with every fma
written out. Minima and maxima are exact in every order. So the results do not depend on threads, tiles or the split of
the axes, nor on shards of axis 0, if a maximum combines the shards' covers of the other axes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from leanops.common.exact import divide, fma, fp32, sqrt
from leanops.common.rounding import round_to
from leanops.sm3.calls import Step

VERSION = "sm3/1"

BLOCK = 256  # elements that share one scale of an int8 momentum; blocks lie within rows of axis 0
_SMALL = 2.0**-120  # a block with no larger magnitude is stored as zeros, so that no scale underflows
_CHUNK = 1 << 18  # elements computed at a time, so that the temporaries stay small; a multiple of BLOCK


def axes_of(shape: Sequence[int]) -> tuple[int, ...]:
    """The sizes of a parameter's accumulators; a 0-d parameter counts as shape (1,)."""
    return tuple(shape) or (1,)


def scale_shape(shape: Sequence[int]) -> tuple[int, int]:
    """The shape of an int8 momentum's scales: rows of axis 0, and blocks within one (at rank 0 and 1 one row)."""
    sizes = tuple(shape)
    rows, columns = (sizes[0], math.prod(sizes[1:])) if len(sizes) > 1 else (1, math.prod(sizes))
    return rows, (columns + BLOCK - 1) // BLOCK


def encode(m: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes [R, C] and scales [R, blocks] of fp32 values [R, C]; a block with a NaN or an infinity reads NaN."""
    rows, columns = m.shape
    blocks = F.pad(m, (0, -columns % BLOCK)).view(rows, -1, BLOCK)
    a = blocks.abs().amax(2)
    finite = a.isfinite()
    zero = a < _SMALL
    scale = torch.where(finite, torch.where(zero, 0.0, divide(a, 127.0, m)), torch.nan)
    inverse = torch.where(zero, 0.0, divide(127.0, a, m))
    codes = torch.where(finite[..., None], (blocks * inverse[..., None]).round(), 1.0)  # ties to even
    return codes.to(torch.int8).view(rows, -1)[:, :columns], scale


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """The fp32 values [R, C] of codes [R, C] and scales [R, blocks]."""
    return codes.float() * scales.repeat_interleave(BLOCK, 1)[:, : codes.shape[1]]


def _slabs(sizes: Sequence[int]) -> Iterator[slice]:
    """Runs of axis 0, of about _CHUNK elements."""
    step = max(1, _CHUNK // math.prod(sizes[1:]))
    return (slice(start, min(start + step, sizes[0])) for start in range(0, sizes[0], step))


def _along(axis: Tensor, k: int, rank: int) -> Tensor:
    """An accumulator as a tensor that broadcasts along every other axis."""
    return axis.view([-1 if j == k else 1 for j in range(rank)])


def _maximum(nu: Tensor, k: int) -> Tensor:
    """The largest nu of every slice across axis k, or NaN if the slice has a NaN."""
    return nu.movedim(k, 0).reshape(nu.shape[k], -1).amax(1)


def _update(nu: Tensor, g: Tensor, eps: float) -> Tensor:
    """g / sqrt(nu + eps), and 0 where nu is 0."""
    return torch.where(nu == 0, 0.0, divide(g, sqrt(nu + fp32(eps)), g))


def _average(stored: Tensor, scales: Tensor | None, x: Tensor, momentum: float) -> Tensor:
    """m = (1 - momentum) x + momentum m, in fp32 and stored; int8 takes rows [R, C] and their scales [R, blocks]."""
    new = x.reshape(stored.shape)
    old = stored.float() if scales is None else decode(stored, scales)
    m = fma(new, fp32(1.0 - momentum), old * fp32(momentum))
    if scales is None:
        stored.copy_(m)
    else:
        codes, fresh = encode(m)
        stored.copy_(codes)
        scales.copy_(fresh)
    return m.reshape(x.shape)


def _moved(w: Tensor, step: Tensor, lr: float, factor: float, decay: float) -> Tensor:
    """w (1 - lr decay) - lr factor step, in fp32 with one fma, in fp64 with two roundings."""
    own = lr * factor
    if w.dtype == torch.float64:
        return (w * (1.0 - lr * decay) if decay else w) - own * step.double()
    shrunk = w * fp32(1.0 - lr * decay) if decay else w
    return fma(step, -fp32(own), shrunk)


def sm3_step_(call: Step) -> None:
    if call.found_inf is not None and float(call.found_inf) != 0:
        return
    o, key, rate = call.options, int(call.seed), float(call.lr)
    rounding = "stochastic" if o.stochastic_rounding else "nearest"
    coupled, decoupled = (0.0, o.weight_decay) if o.decoupled else (o.weight_decay, 0.0)
    factors = [1.0] * len(call.params) if call.lr_factors is None else call.lr_factors.tolist()
    tensors = zip(call.params, call.grads, call.covers, call.tensor_ids, call.offsets, strict=True)
    for i, (param, grad, cover, tensor_id, offset) in enumerate(tensors):
        if param.numel() == 0:
            continue
        sizes = axes_of(param.shape)
        rank, row = len(sizes), math.prod(sizes[1:])
        whole, gradient = param.view(sizes), grad.view(sizes)
        old = cover.split(list(sizes))
        new = [torch.zeros_like(axis) for axis in old]
        for rows in _slabs(sizes):
            p, g = whole[rows], gradient[rows].float()
            if call.grad_scale is not None:
                g = g * divide(1.0, call.grad_scale.to(g.device).reshape(()), g)
            if o.maximize:
                g = -g
            if coupled:
                g = fma(p.float(), fp32(coupled), g)

            parts = [old[0][rows], *old[1:]]
            c = reduce(torch.minimum, (_along(axis, k, rank) for k, axis in enumerate(parts)))  # NaN if any is
            nu = fma(g, g, c) if o.beta == 1 else fma(g * g, fp32(1.0 - o.beta), c * fp32(o.beta))
            new[0][rows] = _maximum(nu, 0)
            for k in range(1, rank):
                new[k] = torch.maximum(new[k], _maximum(nu, k))

            step = g if o.average_gradient else _update(nu, g, o.eps)
            if o.momentum:
                stored = call.momenta[i].view(sizes)[rows]
                if stored.dtype != torch.int8:
                    step = _average(stored, None, step, o.momentum)
                elif rank == 1:
                    blocks = slice(rows.start // BLOCK, (rows.stop + BLOCK - 1) // BLOCK)
                    step = _average(stored.view(1, -1), call.scales[i][:, blocks], step, o.momentum)
                else:
                    step = _average(stored.view(-1, row), call.scales[i][rows], step, o.momentum)

            if o.average_gradient:
                step = _update(nu, step, o.eps)

            w = _moved(p if p.dtype == torch.float64 else p.float(), step, rate, factors[i], decoupled)
            index = torch.arange(offset + rows.start * row, offset + rows.stop * row, device=p.device)
            p.copy_(round_to(w.reshape(-1), p.dtype, rounding, index, key, tensor_id).view(p.shape))
        for axis, fresh in zip(old, new, strict=True):
            axis.copy_(fresh)
