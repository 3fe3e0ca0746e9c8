r"""The update of a step, the same for the run and for its replay, so that both give the same bits.

    theta <- (1 - lr weight_decay) theta - lr m,    m = sum_j beta^j (1/n) sum_k g_{t-j,k} z(s_{t-j,k})

Without momentum (beta = 0) only j = 0 is left. Momentum is either recomputed, one fused pass over the seeds of the
window j < J where beta^J < 2^-24 (158 steps at 0.9), or stored as a tensor, m <- beta m + (1/n) sum_k g_k z(s_k).
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from leanops.common.dtypes import wide_dtype
from leanops.optim.zo.directions import Noise, Seed, left_seeds
from leanops.optim.zo.rounding import write_
from leanops.optim.zo.slots import Slot, by_device
from leanops.zo import zo_axpy_

State = MutableMapping[Tensor, dict[str, Any]]  # an optimizer's tensors of each parameter


@dataclass
class Update:
    """One applied step for the parameters of a group."""

    seeds: Sequence[Seed]
    scalars: Sequence[float]
    terms: tuple[list[Seed], list[float]] | None  # seeds and coefficients of the added sum; None: follows from state
    lr: float  # 0: only the state (momentum, curvature) changes
    beta: float
    decay: float


def apply_(
    slots: Sequence[Slot], seeds: Sequence[Seed], coeffs: Sequence[float], decay: float, noise: Noise, rounding: str
) -> None:
    """One pass over the tensors, one call a device."""
    for part in by_device(slots):
        zo_axpy_(
            [s.local for s in part],
            left_seeds(seeds),
            coeffs,
            decay=decay,
            rounding=rounding,
            **noise.arguments(part, seeds),
        )


def state_tensor(slot: Slot, state: State, name: str, start: float) -> Tensor:
    """A tensor of a parameter's state, ``start`` everywhere at first: fp32, or fp64 for fp64 weights, because half
    precision would lose small steps."""
    tensors = state[slot.param]
    if name not in tensors:
        with torch.inference_mode(False):  # later steps may be outside of inference mode
            tensors[name] = torch.full(slot.local.shape, start, dtype=wide_dtype(slot.local), device=slot.local.device)
    tensor: Tensor = tensors[name]
    return tensor


def momentum_of(slot: Slot, state: State) -> Tensor:
    """The stored momentum of a parameter, zeros at first."""
    return state_tensor(slot, state, "momentum_buffer", 0.0)


def accumulate_(
    slots: Sequence[Slot],
    momenta: Sequence[Tensor],
    seeds: Sequence[Seed],
    scalars: Sequence[float],
    beta: float,
    noise: Noise,
) -> None:
    """m <- beta m + (1/n) sum_k g_k z(s_k)."""
    moved = [s._replace(local=m) for s, m in zip(slots, momenta, strict=True)]
    apply_(moved, seeds, [g / len(scalars) for g in scalars], 1.0 - beta, noise, "nearest")


def descend_(
    slots: Sequence[Slot], momenta: Sequence[Tensor], lr: float, decay: float, rounding: str, seed: int
) -> None:
    """p <- round((1 - decay) p - lr m), every product rounded separately so that no device contracts it."""
    for s, m in zip(slots, momenta, strict=True):
        write_(s, s.local.to(m.dtype) * (1.0 - decay) - m * lr, rounding, seed)
