"""Calls of the operators whose results no release may change, on inputs that are noise of ``zo/1`` themselves.

``python -m release.operators STEP`` prints the digests of every STEP-th call, so that a process with another backend
can be asked for them.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from release.bits import digest
from torch import Tensor

from leanops import sm3_cover, sm3_momentum, sm3_step_, zo_axpy_, zo_axpy_into_, zo_noise

Call = Callable[[torch.device], Sequence[Tensor]]

DTYPES = ("float32", "bfloat16", "float16", "float64")
DISTRIBUTIONS = ("gaussian", "rademacher", "lowrank")
ROUNDINGS = ("nearest", "stochastic")
OFFSETS = (0, 3, 2**32 - 70, 2**33 + 5, 2**62 + 1)
SEEDS = (5, -1, 2**64 - 3, 2**63, 0x123456789ABCDEF)


def inputs(dtype: str, seed: int, device: torch.device, shapes: Sequence[tuple[int, ...]], size: float) -> list[Tensor]:
    """Noise times ``size``, a power of two."""
    kind: dict[str, Any] = {"dtype": getattr(torch, dtype), "device": device}
    return [zo_noise(s, seed, tensor_id=i, **kind) * size for i, s in enumerate(shapes)]


# --- noise ----------------------------------------------------------------------------------------------------------


def noise(device: torch.device, distribution: str, dtype: str, offset: int) -> list[Tensor]:
    how: dict[str, Any] = {"offset": offset, "distribution": distribution, "dtype": getattr(torch, dtype)}
    places = (((301,), 1, 0), ((2, 3, 50), -7, 2**32 - 1), ((), 2**64 - 1, 8))
    return [zo_noise(shape, seed, tensor_id=i, device=device, **how) for shape, seed, i in places]


# --- axpy -----------------------------------------------------------------------------------------------------------

COEFFS = (0.5, -1e-3, 3.0, 1e-8, -0.25)
DECAYS = (0.0, 0.125, 0.0, 0.3, 1.0)
AXPY_SHAPES = ((7, 37), (300,), (), (0,), (5, 4, 3))


def axpy(device: torch.device, distribution: str, dtype: str, rounding: str, kind: str) -> list[Tensor]:
    """Five tensors and seeds: in one sum, rounded after every term, or two of the seeds into other memory."""
    tensors = inputs(dtype, 11, device, AXPY_SHAPES, 0.25)
    n = 2 if kind == "into" else len(SEEDS)
    how: dict[str, Any] = {
        "distribution": distribution,
        "rounding": rounding,
        "tensor_ids": [3, 0, 2**32 - 1, 9, 1],
        "offsets": [0, 1, 2**32 - 5, 0, 2**33 + 3],
    }
    if distribution == "lowrank":
        how |= {"right_seeds": [1, 1, -2, 2**64 - 1, 7][:n], "columns": [37, 0, 0, 0, 12], "rank": 3}
    else:
        tensors[4] = tensors[4].transpose(0, 2)
    if kind == "into":
        out = [torch.full_like(t, math.nan) for t in tensors]
        zo_axpy_into_(out, tensors, SEEDS[:n], COEFFS[:n], **how)
        return out
    sequential = kind == "sequential"
    zo_axpy_(tensors, SEEDS, COEFFS, decay=DECAYS if sequential else 0.01, sequential=sequential, **how)
    return tensors


def axpy_on_extremes(device: torch.device, dtype: str, rounding: str) -> list[Tensor]:
    """Infinities, NaN, zeros of both signs, the smallest and the largest numbers."""
    most = torch.finfo(getattr(torch, dtype)).max
    values = [math.inf, -math.inf, math.nan, -0.0, 0.0, 2.0**-24, -(2.0**-15), 65504.0, -65504.0, most, -most] * 9
    tensor = torch.tensor(values, dtype=getattr(torch, dtype), device=device)
    zo_axpy_(tensor, SEEDS[:3], [2.0**-26, -(2.0**-17), 8.0], rounding=rounding, offsets=[2**32 - 40])
    return [tensor]


def axpy_of_many(device: torch.device, dtype: str, rounding: str) -> list[Tensor]:
    """Three hundred seeds."""
    tensors = inputs(dtype, 12, device, ((19, 17),), 1.0)
    zo_axpy_(tensors, list(range(300)), [1e-3 / (k + 1) for k in range(300)], rounding=rounding, decay=0.1)
    return tensors


# --- SM3 ------------------------------------------------------------------------------------------------------------

SM3_SHAPES = ((5, 300), (9, 8, 3), (300,), (), (7, 1), (0, 4))
SETTINGS: dict[str, dict[str, Any]] = {
    "decoupled": {"beta": 1.0, "weight_decay": 0.1, "decoupled": True, "eps": 1e-30},
    "coupled": {"beta": 0.9, "weight_decay": 0.1, "decoupled": False, "eps": 1e-6, "maximize": True},
}


def sm3(device: torch.device, setting: str, dtype: str, momentum: str | None, rounding: str) -> list[Tensor]:
    """Parameters, covers, momenta and scales after two steps."""
    params = inputs(dtype, 21, device, SM3_SHAPES, 0.25)
    covers = [sm3_cover(p) for p in params]
    both = [sm3_momentum(p, getattr(torch, momentum)) for p in params] if momentum else []
    momenta, scales = [m for m, _ in both], [s for _, s in both]
    for step in range(2):
        grads = inputs(dtype, 31 + step, device, SM3_SHAPES, 2.0**-5)
        grads[0][1] = 0.0
        sm3_step_(
            *(params, grads, covers, momenta, scales if momentum == "int8" else []),
            lr=0.1 / (step + 1),
            momentum=0.9 if momentum else 0.0,
            stochastic_rounding=rounding == "stochastic",
            seed=-5 - step,
            tensor_ids=[4, 0, 2**32 - 1, 2, 1, 7],
            offsets=[0, 2**32 - 9, 5, 2**33, 2**62, 0],
            grad_scale=torch.tensor(3.0, device=device) if setting == "coupled" else None,
            **SETTINGS[setting],
        )
    return [*params, *covers, *momenta, *scales]


# --- all of them ----------------------------------------------------------------------------------------------------


def calls() -> Iterator[tuple[str, Call]]:
    """Every call with its name, which begins with the operator's."""
    for dtype in DTYPES:
        for distribution in DISTRIBUTIONS[:2]:
            for offset in OFFSETS:
                yield (
                    f"zo_noise {distribution} {dtype} {offset}",
                    partial(noise, distribution=distribution, dtype=dtype, offset=offset),
                )
        for rounding in ROUNDINGS:
            how = {"dtype": dtype, "rounding": rounding}
            for distribution in DISTRIBUTIONS:
                for kind in ("sum", "sequential", "into"):
                    name = "zo_axpy_into_" if kind == "into" else f"zo_axpy_ {kind}"
                    yield (
                        f"{name} {distribution} {dtype} {rounding}",
                        partial(axpy, distribution=distribution, kind=kind, **how),
                    )
            yield f"zo_axpy_ extremes {dtype} {rounding}", partial(axpy_on_extremes, **how)
            yield f"zo_axpy_ many {dtype} {rounding}", partial(axpy_of_many, **how)
            for setting in SETTINGS:
                for momentum in (None, "float32", "bfloat16", "int8"):
                    yield (
                        f"sm3_step_ {setting} {dtype} momentum {momentum} {rounding}",
                        partial(sm3, setting=setting, momentum=momentum, **how),
                    )


def digests(device: torch.device, step: int = 1) -> dict[str, str]:
    return {name: digest(call(device)) for name, call in list(calls())[::step]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    served = torch._C._dispatch_has_kernel_for_dispatch_key("leanops::zo_axpy_", "CPU")
    result = {"native": served, "digests": digests(torch.device("cpu"), int(sys.argv[1]))}
    print(json.dumps(result))
