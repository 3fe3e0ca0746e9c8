"""Parameters, gradients and comparisons of the tests of SM3 as an optimizer."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from leanops.optim import SM3

SHAPES = [(6, 5), (4,), (), (3, 2, 4), (0, 3), (2, 300)]


def parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=g).to(dtype)) for s in SHAPES]


def set_grads(params: list[Any], seed: int, scale: float = 1.0) -> None:
    g = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = (scale * torch.randn(p.shape, generator=g)).to(p.dtype)


def snapshot(opt: SM3) -> dict[Any, Any]:
    return copy.deepcopy({i: dict(s) for i, s in enumerate(opt.state.values())})


def equal(a: Any, b: Any) -> bool:
    """Whether two states have the same keys, dtypes and bits."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return bool(a == b)
