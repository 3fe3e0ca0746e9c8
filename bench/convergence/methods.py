"""The methods that the convergence benchmark trains with, and the learning rates that each may choose from.

Each has five rates, a factor of about three apart, around what served a model of 0.9M parameters best. No method has
weight decay: what is compared is how fast the loss falls, within one epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from leanops.optim import LISA, SM3, HalfFineTuning


class Selection(Protocol):
    """The methods that LISA and HalfFineTuning share. ``step()`` follows each step of the optimizer."""

    def step(self) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


Make = Callable[[Iterable[Tensor], float], Optimizer]
Select = Callable[[nn.Module, Optimizer, int, int], Selection]  # the last two: period and seed


@dataclass(frozen=True)
class Method:
    key: str
    label: str
    make: Make
    rates: tuple[float, ...]
    select: Select | None = None
    settings: str = ""

    @property
    def all_train(self) -> bool:
        """Every parameter gets a gradient at every step."""
        return self.select is None


def _adamw(params: Iterable[Tensor], lr: float) -> Optimizer:
    return torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def _adafactor(params: Iterable[Tensor], lr: float) -> Optimizer:
    return torch.optim.Adafactor(params, lr=lr)


def _sm3(momentum: float, dtype: torch.dtype | None = None, cover_warmup: int = 0, momentum_on: str = "update") -> Make:
    def make(params: Iterable[Tensor], lr: float) -> Optimizer:
        options: dict[str, Any] = {"momentum_dtype": dtype, "cover_warmup": cover_warmup, "momentum_on": momentum_on}
        return SM3(params, lr=lr, momentum=momentum, **options)

    return make


def _lisa(model: nn.Module, optimizer: Optimizer, period: int, seed: int) -> Selection:
    return LISA(model, optimizer, active=2, period=period, seed=seed)


def _half(model: nn.Module, optimizer: Optimizer, period: int, seed: int) -> Selection:
    return HalfFineTuning(model, optimizer, period=period, seed=seed)


_SM3_RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
BASELINE = "adamw"
METHODS = (
    Method(BASELINE, "AdamW (fused)", _adamw, (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), None, "betas 0.9, 0.95"),
    Method("adafactor", "Adafactor (torch)", _adafactor, (3e-3, 1e-2, 3e-2, 1e-1, 3e-1), None, "torch's defaults"),
    Method("sm3-fp32", "SM3, momentum fp32", _sm3(0.9, torch.float32), _SM3_RATES, None, "momentum 0.9, beta 1"),
    Method("sm3-bf16", "SM3, momentum bf16", _sm3(0.9, torch.bfloat16), _SM3_RATES, None, "momentum 0.9, beta 1"),
    Method("sm3-int8", "SM3, momentum int8", _sm3(0.9, torch.int8), _SM3_RATES, None, "momentum 0.9, beta 1"),
    Method("sm3-none", "SM3, no momentum", _sm3(0.0), _SM3_RATES, None, "beta 1"),
    Method("sm3-lisa", "SM3 + LISA", _sm3(0.9, torch.float32), _SM3_RATES, _lisa, "momentum 0.9 fp32, 2 blocks train"),
    Method("sm3-hft", "SM3 + half fine-tuning", _sm3(0.9, torch.float32), _SM3_RATES, _half,
           "momentum 0.9 fp32, half of the matrices train"),
)  # fmt: skip

_GRADIENT = "gradient_unpublished"
_FP32 = torch.float32
# for a comparison of SM3's momenta and first steps at every rate
GRID_METHODS = (
    *(m for m in METHODS if m.key in (BASELINE, "sm3-none", "sm3-fp32")),
    Method("sm3-none-covers", "SM3, no momentum, cover_warmup 10", _sm3(0.0, None, 10), _SM3_RATES),
    Method("sm3-fp32-covers", "SM3, momentum fp32, cover_warmup 10", _sm3(0.9, _FP32, 10), _SM3_RATES),
    Method("sm3-gradient", "SM3, momentum fp32 of the gradient", _sm3(0.9, _FP32, 0, _GRADIENT), _SM3_RATES),
    Method("sm3-gradient-covers", "SM3, momentum fp32 of the gradient, cover_warmup 10",
           _sm3(0.9, _FP32, 10, _GRADIENT), _SM3_RATES),
)  # fmt: skip


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of all tensors in the optimizer's state; tensors that share memory count once."""
    seen: dict[int, int] = {}

    def walk(value: Any) -> None:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            for inner in value.values():
                walk(inner)
        elif isinstance(value, (list, tuple)):
            for inner in value:
                walk(inner)

    for state in optimizer.state.values():
        walk(state)
    seen.pop(0, None)  # tensors without elements
    return sum(seen.values())
