"""The definition sm3/1 written a second time, in NumPy. Tests compare the compiled kernels with it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np
from common.oracle import Array, decode, encode, f32, fma, rounding_bits, same

BLOCK = 256
MOMENTA = {"none": np.uint8, "float32": np.float32, "bfloat16": np.uint16, "int8": np.int8}


@dataclass(frozen=True)
class Options:
    lr: float = 0.01
    momentum: float = 0.9
    beta: float = 1.0
    eps: float = 1e-30
    weight_decay: float = 0.0
    decoupled: bool = True
    maximize: bool = False
    stochastic_rounding: bool = False
    average_gradient: bool = False
    grad_scale: float = 1.0
    seed: int = 0


@dataclass
class Parameter:
    """One parameter and its state, flat, as the kernel takes them."""

    shape: tuple[int, ...]
    dtype: str
    kind: str
    param: Array
    grad: Array
    cover: Array
    momentum: Array
    scales: Array
    tensor_id: int = 0
    offset: int = 0
    lr_factor: float = 1.0

    def copy(self) -> Parameter:
        state = {name: getattr(self, name).copy() for name in ("param", "cover", "momentum", "scales")}
        return replace(self, **state)


def axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape or (1,)


def rows_of_blocks(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Rows along axis 0, elements in a row, blocks in a row."""
    rows = shape[0] if len(shape) > 1 else 1
    length = math.prod(shape[1:] if len(shape) > 1 else shape)
    return rows, length, -(-length // BLOCK)


def encode_int8(m: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
    rows, length, blocks = rows_of_blocks(shape)
    codes, scales = np.zeros((rows, length), np.int8), np.zeros((rows, blocks), f32)
    for r in range(rows):
        for b in range(blocks):
            part = m.reshape(rows, length)[r, b * BLOCK : (b + 1) * BLOCK]
            a = np.abs(part).max()
            if not np.isfinite(a):
                codes[r, b * BLOCK :][:BLOCK], scales[r, b] = 1, np.nan
            elif a >= f32(2.0**-120):
                codes[r, b * BLOCK :][:BLOCK] = np.rint(part * (f32(127) / a))
                scales[r, b] = a / f32(127)
    return codes.reshape(-1), scales.reshape(-1)


def decode_int8(codes: Array, scales: Array, shape: tuple[int, ...]) -> Array:
    rows, length, blocks = rows_of_blocks(shape)
    scale_of_element = np.repeat(scales.reshape(rows, blocks), BLOCK, 1)[:, :length].reshape(-1)
    return codes.astype(f32) * scale_of_element


def step(t: Parameter, o: Options) -> Parameter:
    """The parameter and its state after a step."""
    sizes = axes(t.shape)
    if 0 in sizes:
        return t.copy()
    with np.errstate(all="ignore"):
        g = decode(t.grad, t.dtype).astype(f32) * (f32(1) / f32(o.grad_scale))
        if o.maximize:
            g = -g
        w = decode(t.param, t.dtype)
        if o.weight_decay and not o.decoupled:
            g = fma(f32(o.weight_decay), w.astype(f32), g)

        ends = np.cumsum(sizes)
        parts = [t.cover[end - n : end] for n, end in zip(sizes, ends, strict=True)]
        along = [p.reshape([-1 if j == k else 1 for j in range(len(sizes))]) for k, p in enumerate(parts)]
        c = np.broadcast_to(reduce(np.minimum, along), sizes).reshape(-1)
        nu = fma(g, g, c) if o.beta == 1 else fma(f32(1 - o.beta), g * g, f32(o.beta) * c)
        others = [tuple(j for j in range(len(sizes)) if j != k) for k in range(len(sizes))]
        cover = np.concatenate([nu.reshape(sizes).max(other) for other in others])

        def divided(x: Array) -> Array:
            return np.where(nu == 0, f32(0), x / np.sqrt(nu + f32(o.eps)))

        u = g if o.average_gradient else divided(g)
        momentum, scales = t.momentum, t.scales
        if t.kind != "none":
            old = decode_int8(momentum, scales, t.shape) if t.kind == "int8" else decode(momentum, t.kind)
            u = fma(f32(1 - o.momentum), u, f32(o.momentum) * old)
            if t.kind == "int8":
                momentum, scales = encode_int8(u, t.shape)
            else:
                momentum = encode(u, t.kind)
        if o.average_gradient:
            u = divided(u)

        decay = o.weight_decay if o.decoupled else 0.0
        rate = o.lr * np.float64(f32(t.lr_factor))
        if t.dtype == "float64":
            return replace(
                t,
                param=(w * (1 - o.lr * decay) if decay else w) - rate * u.astype(np.float64),
                cover=cover,
                momentum=momentum,
                scales=scales,
            )
        new = fma(-f32(rate), u, w * f32(1 - o.lr * decay))
        r = rounding_bits(o.seed, t.tensor_id, t.offset, len(w)) if o.stochastic_rounding else None
        param = encode(new, t.dtype, r if t.dtype in ("bfloat16", "float16") else None)
    return replace(t, param=param, cover=cover, momentum=momentum, scales=scales)


def differences(got: Parameter, want: Parameter) -> list[str]:
    """Names of the arrays that differ in a bit; any NaN equals any other."""
    kinds = {"param": got.dtype, "cover": "float32", "momentum": got.kind, "scales": "float32"}
    return [
        name
        for name, dtype in kinds.items()
        if not (
            np.array_equal(getattr(got, name), getattr(want, name))
            if dtype in ("none", "int8")
            else same(getattr(got, name), getattr(want, name), dtype)
        )
    ]
