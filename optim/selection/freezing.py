"""Freezing parameters so that they cost nothing: no gradient, no gradient computation, no optimizer state.

A frozen parameter does not require grad, so autograd computes no gradient for it. Its ``grad`` is None, and the
optimizer's entry for it is dropped, moments and step count alike. It stays in its parameter group, where every torch
optimizer skips a parameter without a gradient: weight decay and momentum do not move it either. When it trains again,
the optimizer starts with new state, as at its first step.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from leanops.optim.common import capabilities
from leanops.optim.common.capabilities import holder
from leanops.optim.common.parameters import unwrapped

_frozen = WeakIdKeyDictionary()  # frozen parameter -> name of the class that froze it


class Freezer:
    """Freezes and unfreezes the parameters that require grad when it is made, by name. Others are left alone."""

    def __init__(self, op: str, model: Any, optimizer: Any) -> None:
        self.op = op
        if not isinstance(model, nn.Module):
            raise TypeError(f"{op}: model must be a torch.nn.Module, got {type(model).__name__}")
        self.model = unwrapped(model)
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
        if not isinstance(inner, Optimizer):
            raise TypeError(f"{op}: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if isinstance(inner, torch.optim.LBFGS):
            raise ValueError(
                f"{op}: optimizer must keep its state by parameter, got LBFGS, whose history spans them all"
            )
        if capabilities.state_is_replayed(inner):
            kind = type(inner).__name__
            which = "momentum_mode='store' or variant='hizoo'"
            raise ValueError(f"{op}: optimizer must not be {kind} with {which}: its log would not replay")
        self.optimizer = inner
        for name, p in self.model.named_parameters():
            if not p.requires_grad and p in _frozen:
                raise ValueError(
                    f"{op}: model must be released first, got {name} as {_frozen[p]} froze it; call release() of the "
                    f"{_frozen[p]}, or set requires_grad of the parameters that shall train"
                )
        self.params: dict[str, Tensor] = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        if not self.params:
            raise ValueError(f"{op}: model must have parameters that require grad, got none")
        held = {id(p) for group in inner.param_groups for p in group["params"]}
        absent = [n for n, p in self.params.items() if id(p) not in held]
        if absent:
            raise ValueError(
                f"{op}: optimizer must hold every parameter of the model that requires grad, got one without "
                f"{absent[0]} ({len(absent)} of {len(self.params)} are absent)"
            )
        self._eager = bool(self.fresh(nn.Parameter(torch.zeros(1, device="cpu"))))

    def fresh(self, p: Tensor) -> dict[str, Any]:
        """The state that the optimizer makes for a parameter at construction: empty for most, not for Adagrad."""
        try:
            kind = holder(self.optimizer, next(iter(self.params.values())))
            made = type(kind)([p], **kind.defaults)
        except Exception:  # its defaults are not its arguments: assume that construction makes no state
            return {}
        return dict(made.state.get(p, {}))

    @property
    def trainable(self) -> list[str]:
        return [n for n, p in self.params.items() if p.requires_grad]

    def apply(self, trainable: Collection[str]) -> None:
        """Let these train and freeze the others. The optimizer's state is not touched yet; see :meth:`free`."""
        for name, p in self.params.items():
            train = name in trainable
            if p.requires_grad != train:
                p.requires_grad_(train)
            if train:
                _frozen.pop(p, None)
            else:
                _frozen[p] = self.op
                p.grad = None
            if train and self._eager and p not in (state := holder(self.optimizer, p).state):
                state[p] = self.fresh(p)

    def free(self) -> None:
        """Drop the optimizer's state of all frozen parameters."""
        counting: Optimizer | None = None
        for p in self.params.values():
            if not p.requires_grad:
                optimizer = holder(self.optimizer, p)
                capabilities.free_state(optimizer, p)
                if any("step" in group for group in optimizer.param_groups):
                    counting = optimizer
        if counting is not None:
            warnings.warn(
                f"{self.op}: {type(counting).__name__} counts steps by parameter group, so a parameter that trains "
                "again has new moments and an old step count; its first updates differ in size from a new optimizer's",
                stacklevel=4,
            )
