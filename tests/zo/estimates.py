"""The estimates that MeZO logs, and the same ones written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import leanops as lo
from leanops.common import seeds as seed_rule
from leanops.optim import MeZO

EPS = 1e-2


def spsa(params: list[nn.Parameter], closure: Callable[[], Tensor], step: int = 0) -> float:
    """The estimate of a step, written by hand: the weights are set, evaluated, and put back."""
    before = [p.detach().clone() for p in params]
    losses = []
    with torch.no_grad():
        for sign in (1, -1):
            for i, (p, w) in enumerate(zip(params, before, strict=True)):
                lo.zo_axpy_into_(p, w, seed_rule.derive(0, step, 0), sign * EPS, tensor_ids=[i])
            losses.append(float(closure()))
        for p, w in zip(params, before, strict=True):
            p.copy_(w)
    return float(np.float32((losses[0] - losses[1]) / (2 * EPS)))


def estimates(params: Any, closure: Callable[[], Any], steps: int = 1, **options: Any) -> list[float]:
    opt = MeZO(params, **{"lr": 0.0, "eps": EPS, **options})
    for _ in range(steps):
        opt.step(closure)
    return [float(g) for g in opt.log.scalars().ravel()]
