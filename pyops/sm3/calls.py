"""The call of SM3's operator: its arguments as fields, and the ranges of its options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from leanops.common.checks import LARGEST_FLOAT32

MOMENTUM_ON = ("update", "gradient_unpublished")  # what the momentum averages; the second is not in the paper


class StepOptions(NamedTuple):
    """The options of a step: they are the same for all parameters, and never on the device."""

    momentum: float
    beta: float
    eps: float
    weight_decay: float
    decoupled: bool
    maximize: bool
    stochastic_rounding: bool
    average_gradient: bool = False  # the momentum is of the gradient, before the division; not in the paper

    def check(self, op: str) -> None:
        """Raise ValueError for a number out of its range. A NaN is in no range. Finite means finite in float32."""
        if not 0 <= self.momentum < 1:
            raise ValueError(f"{op}: momentum must be in [0, 1), got {self.momentum}")
        if not 0 < self.beta <= 1:
            raise ValueError(f"{op}: beta must be in (0, 1], got {self.beta}")
        if not 0 <= self.eps <= LARGEST_FLOAT32:
            raise ValueError(f"{op}: eps must be a finite float32 number >= 0, got {self.eps}")
        if not 0 <= self.weight_decay <= LARGEST_FLOAT32:
            raise ValueError(f"{op}: weight_decay must be a finite float32 number >= 0, got {self.weight_decay}")


class Step(NamedTuple):
    """``sm3_step_``. Lists have an entry for each parameter; ``momenta`` and ``scales`` may be empty."""

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    covers: Sequence[Tensor]  # float32 [sum of the sizes of the axes]
    momenta: Sequence[Tensor]  # float32, bfloat16 or int8; none without momentum
    scales: Sequence[Tensor]  # float32: of int8 momenta [rows, blocks], of others [0]; none where no momentum is int8
    lr: Tensor  # one number, float32 or float64
    seed: Tensor  # one number, int64: of stochastic rounding
    grad_scale: Tensor | None  # one number, float32: gradients are divided by it
    found_inf: Tensor | None  # one number, float32: where it is not 0, nothing is written
    tensor_ids: Sequence[int]
    offsets: Sequence[int]  # index of a parameter's first element in its whole tensor
    options: StepOptions
    lr_factors: Tensor | None = None  # float32 [parameters]: what each one's rate is multiplied by; decay is not
