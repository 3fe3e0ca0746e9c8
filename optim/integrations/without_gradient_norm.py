"""A Trainer for steps that leave no gradients."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Trainer


class WithoutGradientNorm(Trainer):
    """Neither measures, clips nor logs the norm of the gradients, because there are none after the backward pass."""

    def _clip_grad_norm(self, model: nn.Module) -> None:
        return None

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        return None
