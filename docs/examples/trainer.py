"""MeZO through ``transformers.Trainer``: one subclass, two methods.

Trainer's loop calls ``training_step`` and then ``optimizer.step()``. Here ``training_step`` takes the whole
MeZO step, and the optimizer that Trainer sees passes over the ``step()`` that follows. Schedules, logging,
evaluation and checkpoints (the optimizer's state with its log included) are Trainer's own. Gradient
accumulation and clipping have no meaning without gradients and are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from leanops.optim import MeZO


class _InTrainer(MeZO):
    """MeZO whose ``step()`` without a closure does nothing, for Trainer's loop calls it after ``training_step``."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        return None if closure is None else super().step(closure)


class MeZOTrainer(Trainer):
    """Trainer that fine-tunes by forward passes alone.

    Args:
        mezo: options of :class:`leanops.optim.MeZO`; learning rate, weight decay and seed are TrainingArguments'.
            Everything else is Trainer's.
    """

    def __init__(self, *args: Any, mezo: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.gradient_accumulation_steps != 1:
            raise ValueError(
                "MeZOTrainer: gradient_accumulation_steps must be 1 (there are no gradients to accumulate; raise "
                f"directions or the batch size instead), got {self.args.gradient_accumulation_steps}"
            )
        self.args.max_grad_norm = 0.0  # nothing to clip
        self._options = dict(mezo or {})

    @property
    def mezo(self) -> MeZO:
        """The optimizer, under what accelerate wraps around it."""
        wrapped: Any = self.optimizer
        while not isinstance(wrapped, MeZO):
            wrapped = wrapped.optimizer
        return wrapped

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = model or self.model
            if model is None:
                raise ValueError("MeZOTrainer: create_optimizer needs a model")
            decaying = set(self.get_decay_parameter_names(model))
            pairs = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
            groups = [
                {"params": [pair for pair in pairs if (pair[0] in decaying) == decays], "weight_decay": decay}
                for decays, decay in ((True, self.args.weight_decay), (False, 0.0))
            ]
            self.optimizer = _InTrainer(
                [g for g in groups if g["params"]],
                lr=self.args.learning_rate,
                model=model,
                **{"seed": self.args.seed, **self._options},
            )
        return self.optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Two (or more) evaluations of the loss on one batch, and the update. Returns the mean loss."""
        model.train()
        batch = self._prepare_inputs(inputs)

        def loss() -> Tensor:
            with self.compute_loss_context_manager():
                value = self.compute_loss(model, batch, num_items_in_batch=num_items_in_batch)
            assert isinstance(value, Tensor)  # a pair only where outputs are asked for
            return value.mean()

        return torch.as_tensor(self.mezo.step(loss), device=self.args.device)
