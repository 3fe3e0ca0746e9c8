"""The zeroth-order operators in pure PyTorch: the specification that every kernel is compared with.

``zo/1`` defines the noise ``z`` as a function of (seed, tensor_id, index) alone: Philox4x32-10 counters, 24-bit
uniforms, and a Box-Muller transform of fixed fp32 polynomials with every fma written out. Low-rank noise consists of
two such Gaussian factors, one for rows and one for columns. The operators at the end of the file apply the noise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from leanops.common.dtypes import wide_dtype
from leanops.common.exact import fma, sqrt
from leanops.common.philox import words_at
from leanops.common.rounding import round_to
from leanops.common.streams import GAUSSIAN, LEFT, RADEMACHER, RIGHT
from leanops.zo.calls import Axpy, AxpyInto, Linear, Noise, NoiseInPlace, NoiseSum

VERSION = "zo/1"

_CHUNK = 1 << 18  # elements computed at a time, so that the temporaries stay small; a multiple of 128

# minimax polynomials, rounded to fp32: -2 ln(1 + f) / f on [-1/4, 1/2]; -sin(pi y) / y and cos(pi y) in y^2, |y| <= 1/2
_LOG = [float.fromhex(c) for c in (
    "-0x1.00001p+1", "0x1.fffd2cp-1", "-0x1.5520fp-1", "0x1.007cb6p-1",
    "-0x1.a789b4p-2", "0x1.5b9f46p-2", "-0x1.5ca78ap-3",
)]  # fmt: skip
_SIN = [float.fromhex(c) for c in (
    "-0x1.921fb4p+1", "0x1.4abbb6p+2", "-0x1.466778p+1", "0x1.323324p-1", "-0x1.3c4d66p-4",
)]  # fmt: skip
_COS = [float.fromhex(c) for c in (
    "0x1.fffffep-1", "-0x1.3bd3a6p+2", "0x1.03bd06p+2", "-0x1.54f61ap+0", "0x1.c1f066p-3",
)]  # fmt: skip
_MINUS_2_LN2 = float.fromhex("-0x1.62e43p+0")


def _horner(coefficients: list[float], x: Tensor) -> Tensor:
    p = torch.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        p = fma(p, x, c)
    return p


def box_muller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two standard normal fp32 values from two 32-bit words: rho cos(2 pi u2), rho sin(2 pi u2)."""
    k = (a >> 8) + 1  # u1 = k 2^-24
    i = (k.float().view(torch.int32) - 0x4B400000).long()
    e = (i >> 23).float()
    f = ((i & 0x7FFFFF) + 0x3F400000).int().view(torch.float32) - 1.0
    t = fma(e, _MINUS_2_LN2, f * _horner(_LOG, f))
    rho = sqrt(t)
    y = (((b >> 8) & 0x7FFFFF) | 0x3F800000).int().view(torch.float32) - 1.5
    s = y * y
    rho = torch.where(b & 0x80000000 != 0, -rho, rho)
    return rho * (_horner(_SIN, s) * y), rho * _horner(_COS, s)


def gaussian(index: Tensor, seed: int, tensor_id: int, stream: int) -> Tensor:
    """Standard normal values, fp32, at a contiguous run of indices (int64) of a stream."""
    x = words_at(index, 4, stream, seed, tensor_id)
    half = (index % 4 // 2)[:, None] * 2  # first word of the pair: 0 or 2
    even, odd = box_muller(x.gather(1, half)[:, 0], x.gather(1, half + 1)[:, 0])
    return torch.where(index % 2 == 0, even, odd)


def low_rank(index: Tensor, left: int, right: int, tensor_id: int, columns: int, rank: int) -> Tensor:
    """z = U V^T at a contiguous run of indices of a matrix with ``columns`` columns.

    u[i, p] is the Gaussian of stream 3, key left, at index i rank + p; v[j, p] that of stream 4, key right, at
    j rank + p. z[i, j] = u[i, 0] v[j, 0], then z = fma(u[i, p], v[j, p], z) for p = 1, 2, ...
    """

    def factor(lines: Tensor, seed: int, stream: int) -> Tensor:
        """The factor's rows ``lines``: [n, rank]."""
        low, high = int(lines.min()), int(lines.max()) + 1
        entries = torch.arange(low * rank, high * rank, device=index.device)
        return gaussian(entries, seed, tensor_id, stream).view(-1, rank)[lines - low]

    u, v = factor(index // columns, left, LEFT), factor(index % columns, right, RIGHT)
    z = u[:, 0] * v[:, 0]
    for p in range(1, rank):
        z = fma(u[:, p], v[:, p], z)
    return z


def noise(index: Tensor, seed: int, tensor_id: int, distribution: str) -> Tensor:
    """z, fp32, at a contiguous run of indices (int64)."""
    if index.numel() == 0:
        return torch.empty(0, device=index.device)
    if distribution == "rademacher":
        words = words_at(index, 128, RADEMACHER, seed, tensor_id)
        word = words.gather(1, (index % 128 // 32)[:, None])[:, 0]
        return (1 - 2 * ((word >> (index % 32)) & 1)).float()
    return gaussian(index, seed, tensor_id, GAUSSIAN)


class _Terms(NamedTuple):
    """The numbers of the terms of a sum of noise."""

    seeds: list[int]
    right_seeds: list[int]
    coeffs: list[float]
    decays: list[float]


def _axpy(p: Tensor, index: Tensor, terms: _Terms, noise_sum: NoiseSum, tensor_id: int, columns: int) -> Tensor:
    """The new values of a contiguous run of elements p."""
    dtype, rounding, sequential = p.dtype, noise_sum.rounding, noise_sum.sequential
    wide = wide_dtype(p)

    def scalar(value: float) -> float:
        return float(torch.tensor(value, dtype=wide, device="cpu"))

    acc = p.to(wide)
    if not sequential:
        acc = acc * scalar(1.0 - terms.decays[0])
    for k, (seed, c) in enumerate(zip(terms.seeds, terms.coeffs, strict=True)):
        if sequential:
            acc = acc.to(wide) * scalar(1.0 - terms.decays[k % len(terms.decays)])
        if columns and index.numel():
            z = low_rank(index, seed, terms.right_seeds[k], tensor_id, columns, noise_sum.rank)
        else:
            z = noise(index, seed, tensor_id, noise_sum.distribution)
        acc = fma(z, scalar(c), acc) if wide == torch.float32 else acc + z.double() * c
        if sequential:
            acc = round_to(acc, dtype, rounding, index, seed, tensor_id)
    return acc if sequential else round_to(acc, dtype, rounding, index, terms.seeds[0], tensor_id)


def zo_noise_(call: NoiseInPlace) -> None:
    out, n = call.out, call.out.numel()
    flat = torch.empty(n, dtype=out.dtype, device=out.device)
    for start in range(0, n, _CHUNK):
        stop = min(start + _CHUNK, n)
        index = torch.arange(call.offset + start, call.offset + stop, device=out.device)
        flat[start:stop] = noise(index, int(call.seed), call.tensor_id, call.distribution)
    out.copy_(flat.view(out.shape))


def zo_noise(call: Noise) -> Tensor:
    out = torch.empty(call.shape, dtype=call.dtype, device=call.device)
    seed = torch.tensor(call.seed, device="cpu")
    zo_noise_(NoiseInPlace(out, seed, call.tensor_id, call.offset, call.distribution))
    return out


def zo_axpy_into_(call: AxpyInto) -> None:
    noise_sum = call.noise
    right = [] if noise_sum.right_seeds is None else noise_sum.right_seeds.tolist()
    terms = _Terms(noise_sum.seeds.tolist(), right, noise_sum.coeffs.tolist(), noise_sum.decays.tolist())
    places = zip(noise_sum.tensor_ids, noise_sum.offsets, noise_sum.widths(), strict=True)
    for o, p, (tensor_id, offset, columns) in zip(call.out, call.tensors, places, strict=True):
        flat = p.reshape(-1).clone()
        for start in range(0, flat.numel(), _CHUNK):
            part = flat[start : start + _CHUNK]
            index = torch.arange(offset + start, offset + start + part.numel(), device=p.device)
            part.copy_(_axpy(part, index, terms, noise_sum, tensor_id, columns))
        o.copy_(flat.view(o.shape))


def zo_axpy_(call: Axpy) -> None:
    zo_axpy_into_(call.into())


def zo_linear(call: Linear) -> tuple[Tensor, Tensor]:
    x, weight = call.x, call.weight
    z = torch.empty(weight.shape, dtype=torch.float64, device=weight.device)
    zo_noise_(NoiseInPlace(z, call.seed, call.tensor_id, call.offset, call.distribution))
    # W ± scale z is formed in fp64; the product runs in fp32, or in fp64 for fp64
    wide = wide_dtype(x)
    b = None if call.bias is None else call.bias.to(wide)
    minus = x if call.x_minus is None else call.x_minus
    y_plus = torch.nn.functional.linear(x.to(wide), (weight.double() + call.scale * z).to(wide), b)
    y_minus = torch.nn.functional.linear(minus.to(wide), (weight.double() - call.scale * z).to(wide), b)
    return y_plus.to(x.dtype), y_minus.to(x.dtype)
