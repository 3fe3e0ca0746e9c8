"""A parameter group's options, as the operator takes them: numbers, dtype, rate, seed, and the device of ``step``."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from leanops.common import seeds, streams
from leanops.common.checks import integer, one_of, rate_is_one_number
from leanops.optim.sm3.state import MOMENTUM_DTYPES, loaded_group, number
from leanops.sm3 import MOMENTUM_ON, StepOptions

Group = dict[str, Any]

_COUNTED = 2**24  # float32, which `step` is, counts no further


def options_of(group: Group, momentum: float | None = None) -> StepOptions:
    """A group's options, as the operator takes them; ``momentum`` overrides the group's.

    Raises TypeError for text, which YAML gives for 1e-30, and ValueError for a number out of its range.
    """
    options = StepOptions(
        momentum=_number("momentum", group["momentum"] if momentum is None else momentum),
        beta=_number("beta", group["beta"]),
        eps=_number("eps", group["eps"]),
        weight_decay=_number("weight_decay", group["weight_decay"]),
        decoupled=bool(group["decoupled"]),
        maximize=bool(group["maximize"]),
        stochastic_rounding=bool(group["stochastic_rounding"]),
        average_gradient=averages_gradient(group),
    )
    options.check("SM3")
    return options


def warming_options(group: Group) -> StepOptions:
    """Those of a step that fills covers. Its rate is 0, but a decoupled decay comes as a number of its own."""
    options = options_of(group, 0.0)
    return options._replace(weight_decay=0.0) if options.decoupled else options


def averages_gradient(group: Group) -> bool:
    """Whether the momentum is of the gradient, before the division."""
    one_of("SM3", "momentum_on", group["momentum_on"], MOMENTUM_ON)
    return bool(group["momentum_on"] == "gradient_unpublished")


def cover_warmup(group: Group) -> int:
    """How many steps of a parameter fill covers only. ValueError for what is no integer in [0, 2^24)."""
    return integer("SM3", "cover_warmup", group["cover_warmup"], _COUNTED)


def _number(name: str, value: Any) -> float:
    if isinstance(value, str | bytes):
        raise TypeError(f"SM3: {name} must be a number, got {value!r}")
    return float(value)


def momentum_dtype(group: Group) -> torch.dtype | None:
    """The dtype of the group's new momenta; None: float32. A saved group holds the dtype's name."""
    dtype: torch.dtype | None = loaded_group(group)["momentum_dtype"]
    one_of("SM3", "momentum_dtype", dtype, (None, *MOMENTUM_DTYPES))
    return dtype


def rate(lr: Any, device: torch.device) -> Tensor:
    """lr as the operator takes it: one element of float32 or float64, on the CPU or on the parameters' device."""
    rate_is_one_number("SM3", lr)
    if not isinstance(lr, Tensor):
        return torch.tensor(lr, dtype=torch.float64, device="cpu")
    wide = lr if lr.dtype in (torch.float32, torch.float64) else lr.double()
    return readable_from(wide, device)


def readable_from(t: Tensor, device: torch.device) -> Tensor:
    """The number on the device or on the CPU, where the operator can read it."""
    return t if t.device == device or t.device.type == "cpu" else t.to(device)


def scaler(value: Any, device: torch.device) -> Tensor | None:
    """``grad_scale`` or ``found_inf``, which GradScaler sets on the optimizer, as the operator takes it."""
    return None if value is None else readable_from(number(value), device)


def rounding_seed(seed: int, steps: Tensor) -> Tensor:
    """The seed of a call, which differs at each step. ``steps`` is the largest step count of the call's parameters."""
    return steps.to(torch.int64) + rounding_start(seed)


@cache
def rounding_start(seed: int) -> int:
    """The seed of an optimizer's first step, as int64."""
    start = seeds.derive(seeds.check("SM3", seed), 0, stream=streams.SM3_SEEDS)
    return start - 2**64 if start >= 2**63 else start


def device_of_step(group: Group, device: torch.device) -> torch.device:
    """The device of ``step``: as in torch, the parameters' with ``capturable`` or ``fused``, else the CPU."""
    return device if group["capturable"] or group["fused"] else torch.device("cpu")


def name_of(group: Group, place: int, position: int) -> str:
    """A parameter's name. ``place`` is its index in the group, ``position`` its index among all parameters."""
    return str(group["param_names"][place] if "param_names" in group else position)
