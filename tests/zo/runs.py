"""Runs of MeZO with all that a log records: a schedule, a frozen phase, a skipped step, a step with lr 0."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from leanops.optim import MeZO

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
HIZOO = {"variant": "hizoo", "smoothing": 0.01}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.6},
    "stored momentum": {"momentum": 0.6, "momentum_mode": "store"},
    "directions": {"directions": 3},
    "rademacher": {"distribution": "rademacher", "variant": "sign"},
    "fzoo": {"distribution": "rademacher", "variant": "fzoo", "directions": 2},
    "low rank": {"distribution": "lowrank", "period": 4},
    "low rank, rank 1, a period of 1": {"distribution": "lowrank", "rank": 1, "period": 1},
    "low rank, momentum": {"distribution": "lowrank", "period": 4, "momentum": 0.6},
    "low rank, stored momentum": {"distribution": "lowrank", "period": 4, "momentum": 0.6, "momentum_mode": "store"},
    "low rank, directions": {"distribution": "lowrank", "period": 4, "directions": 3, "variant": "one_sided"},
    "hizoo": HIZOO,
    "hizoo, directions": {**HIZOO, "directions": 3},
    "hizoo, stored momentum": {**HIZOO, "momentum": 0.6, "momentum_mode": "store"},
}


def model_of(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv1d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 1)).to(dtype)


def take(opt: MeZO, model: nn.Module, steps: range) -> None:
    """These steps of a run."""
    x = torch.randn(16, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    x = x.to(next(model.parameters()).dtype)
    for step in steps:
        opt.param_groups[0]["lr"] = 0.0 if step == 7 else 2e-2 / (1 + step // 3)
        model[0].bias.requires_grad_(step not in (4, 5))  # type: ignore[index]
        bad = math.nan if step == 2 else 1.0
        opt.step(lambda bad=bad: (model(x).double() ** 2).mean() * bad)


def run(dtype: torch.dtype, steps: int = 11, **options: Any) -> tuple[nn.Module, nn.Module, MeZO]:
    """Start weights, end weights and optimizer."""
    model = model_of(dtype)
    start = copy.deepcopy(model)
    opt = MeZO(model.parameters(), weight_decay=0.1, model=model, on_nonfinite="skip", seed=-3, **options)
    take(opt, model, range(steps))
    return start, model, opt


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def bits(p: Tensor) -> Tensor:
    """The bytes of a tensor, as a copy."""
    return p.detach().contiguous().view(torch.uint8).clone()


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 1)).to(dtype)


def loss_of(model: nn.Module, dtype: torch.dtype = torch.float32) -> Any:
    g = torch.Generator().manual_seed(4)
    x = torch.randn(32, 5, generator=g).to(dtype)
    y = x.sum(1, keepdim=True).tanh()
    return lambda: nn.functional.mse_loss(model(x), y)
