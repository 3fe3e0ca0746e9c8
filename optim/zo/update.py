r"""The update of a step, the same for the run and for its replay, so that both give the same bits.

    theta <- (1 - lr weight_decay) theta - lr m,    m = sum_j beta^j (1/n) sum_k g_{t-j,k} z(s_{t-j,k})

Without momentum (beta = 0) only j = 0 is left. Momentum is either recomputed, one fused pass over the seeds of the
window j < J where beta^J < 2^-24 (158 steps at 0.9), or stored as a tensor, m <- beta m + (1/n) sum_k g_k z(s_k).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice

import torch
from torch import Tensor

from leanops.common.dtypes import wide_dtype
from leanops.optim.zo.directions import Noise, Seed, left
from leanops.optim.zo.rounding import write_
from leanops.optim.zo.slots import Slot, by_device
from leanops.zo import zo_axpy_

History = deque[tuple[Sequence[Seed], Sequence[float]]]  # (seeds, scalars) of steps, the newest first


def window(beta: float) -> int:
    """How many steps momentum looks back, the present one included: those with beta^j >= 2^-24."""
    return 1 if beta == 0.0 else 1 + math.floor(math.log(2.0**-24) / math.log(beta))


def terms(
    history: Iterable[tuple[Sequence[Seed], Sequence[float]]], lr: float, beta: float
) -> tuple[list[Seed], list[float]]:
    """Seeds and coefficients of one update, the present step first: its first seed keys stochastic rounding."""
    seeds: list[Seed] = []
    coeffs: list[float] = []
    for j, (step_seeds, scalars) in enumerate(islice(history, window(beta))):
        weight = lr * beta**j / len(scalars)
        seeds += step_seeds
        coeffs += [-(weight * g) for g in scalars]
    return seeds, coeffs


def apply_(
    slots: Sequence[Slot], seeds: Sequence[Seed], coeffs: Sequence[float], decay: float, noise: Noise, rounding: str
) -> None:
    """One pass over the tensors, one call a device."""
    for part in by_device(slots):
        zo_axpy_(
            [s.local for s in part],
            left(seeds),
            coeffs,
            decay=decay,
            rounding=rounding,
            **noise.arguments(part, seeds),
        )


def new_momentum(slot: Slot) -> Tensor:
    """A zero m for a slot: fp32 (fp64 for fp64), for half precision would lose small steps."""
    with torch.inference_mode(False):  # later steps may be outside of it
        return torch.zeros(slot.local.shape, dtype=wide_dtype(slot.local), device=slot.local.device)


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
