"""Steps inside the backward pass in Hugging Face's Trainer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from leanops.integrations.without_gradient_norm import WithoutGradientNorm
from leanops.optim.common.capabilities import moves_in_backward
from leanops.optim.fused_backward import FusedBackward, fuse_into_backward


class FusedTrainer(WithoutGradientNorm):
    """``transformers.Trainer`` whose optimizer steps inside the backward pass, see :func:`fuse_into_backward`.

    ::

        args = TrainingArguments("out", max_grad_norm=0)
        FusedTrainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=(SM3, {"lr": 0.03})).train()

    The optimizer's class is that of ``optimizer_cls_and_kwargs``, else that of ``args.optim``; Trainer makes the groups
    with and without weight decay. ``optimizers=(fuse_into_backward(...), schedule)`` gives the optimizer itself.
    Trainer measures the norm of the gradients also where it does not clip; this class does not, because the backward
    pass has freed them.

    Raises:
        ValueError: what needs all gradients at once: ``max_grad_norm`` above 0 (Trainer's default is 1),
            ``gradient_accumulation_steps`` above 1, ``fp16``, DeepSpeed, several processes without FSDP; an optimizer
            in ``optimizers`` that does not step in the backward pass.
        TypeError: ``optimizer_cls_and_kwargs`` or ``args.optim`` names something other than a class of optimizers.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name, wanted, seen, why in (
            ("max_grad_norm", 0, self.args.max_grad_norm or 0, "clipping by norm needs all gradients at once"),
            ("gradient_accumulation_steps", 1, self.args.gradient_accumulation_steps, "gradients do not accumulate"),
            ("fp16", False, bool(self.args.fp16), "GradScaler needs all gradients at once; use bf16"),
            ("deepspeed", None, self.args.deepspeed, "DeepSpeed's engine steps by itself"),
        ):
            if seen != wanted:
                raise ValueError(f"FusedTrainer: args.{name} must be {wanted}, got {seen}: {why}")
        if self.accelerator.num_processes > 1 and not self.is_fsdp_enabled:
            raise ValueError(
                f"FusedTrainer: the run must be one process or use FSDP, got {self.accelerator.num_processes} "
                "processes: DistributedDataParallel averages gradients after the step has used them"
            )
        if self.optimizer is not None and not moves_in_backward(self.optimizer):
            raise ValueError(
                "FusedTrainer: optimizers must hold an optimizer of fuse_into_backward, got "
                f"{type(self.optimizer).__name__}; or pass its class in optimizer_cls_and_kwargs"
            )

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        if self.optimizer is None:
            chosen = self.optimizer_cls_and_kwargs
            whole: Any = self.model if model is None else model
            optimizer_class, options = chosen or self.get_optimizer_cls_and_kwargs(self.args, whole)
            self.optimizer_cls_and_kwargs = (_fused(optimizer_class), options)
            try:
                super().create_optimizer(*(() if model is None else (model,)))
            finally:
                self.optimizer_cls_and_kwargs = chosen
        made: Any = self.optimizer
        return made


def _fused(optimizer_class: type[Optimizer]) -> type[Optimizer]:
    """A class for Trainer to call with parameter groups: it makes a :class:`FusedBackward`."""

    class Fused(torch.optim.Optimizer):
        def __new__(cls, params: Any, **options: Any) -> FusedBackward:  # type: ignore[misc]
            return fuse_into_backward(optimizer_class, params, **options)

    return Fused
