"""MeZO in Hugging Face's Trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from leanops.integrations.batches import copy_of
from leanops.integrations.without_gradient_norm import WithoutGradientNorm
from leanops.optim.zo.mezo import MeZO


class _MeZOInLoop(MeZO):
    """Trainer's loop calls ``step()`` after ``training_step``, which has taken the step already: that call is idle."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        return None if closure is None else super().step(closure)


class MeZOTrainer(WithoutGradientNorm):
    """``transformers.Trainer`` that fine-tunes with :class:`leanops.optim.MeZO`: forward passes, no backward pass.

    ::

        trainer = MeZOTrainer(model, args, train_dataset=data, mezo={"eps": 1e-3, "distribution": "rademacher"})
        trainer.train()
        trainer.mezo.log.save("run.zolog")

    ``training_step`` takes the whole step. Schedules, logging, evaluation, prediction and checkpoints are Trainer's
    own. A checkpoint holds the optimizer's log, so ``resume_from_checkpoint`` gives the bits of an uninterrupted run.

    **Every evaluation of a step gets its own copy of the batch.** So Trainer, the model and a subclass's
    ``compute_loss`` may change the batch, as ``label_smoothing_factor`` and ``compute_loss_func`` do.

    **Several processes** (torchrun, ``accelerate launch``) evaluate the same perturbation on their own batches and
    exchange one scalar a step.

    **Gradient accumulation** means a larger batch in the memory of a small one: a step evaluates the loss of
    ``gradient_accumulation_steps`` batches one after another at the same weights, and adds them as Trainer adds their
    gradients. The loss of the step is reported with the last batch.

    Args:
        mezo: options of :class:`leanops.optim.MeZO`. By default, ``lr``, ``seed`` and the two parameter groups with
            and without ``weight_decay`` are those of the TrainingArguments; ``{"params": groups}`` gives others.
        args, kwargs: Trainer's. ``max_grad_norm`` is set to 0, because there is no gradient to clip.

    Raises:
        TypeError: ``mezo`` that is no mapping.
        ValueError: an optimizer in ``optimizers`` or ``optimizer_cls_and_kwargs``; DeepSpeed.

    Combine it with a subclass of Trainer by ``class Mine(MeZOTrainer, Seq2SeqTrainer)``.
    """

    def __init__(self, *args: Any, mezo: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        chosen = self.optimizer or getattr(self, "optimizer_cls_and_kwargs", None)
        if chosen is not None:
            name = type(chosen).__name__ if self.optimizer is not None else str(chosen)
            raise ValueError(
                "MeZOTrainer: optimizers and optimizer_cls_and_kwargs must not choose an optimizer, because the "
                f"trainer makes MeZO with the options mezo={{...}}, got {name}"
            )
        if not isinstance(mezo, Mapping | None):
            raise TypeError(f"MeZOTrainer: mezo must be a mapping of options of MeZO, got {type(mezo).__name__}")
        if self.is_deepspeed_enabled:
            raise ValueError("MeZOTrainer: args.deepspeed must be None: DeepSpeed's engine steps by gradients")
        self.args.max_grad_norm = 0.0
        self._mezo_options = dict(mezo or {})
        self._micro_batches: list[dict[str, Any]] = []  # of the step that has begun

    @property
    def mezo(self) -> MeZO:
        """The optimizer, without accelerate's wrapper. RuntimeError before ``train()`` has made it."""
        optimizer: Any = self.optimizer
        while optimizer is not None and not isinstance(optimizer, MeZO):
            optimizer = getattr(optimizer, "optimizer", None)
        if optimizer is None:
            raise RuntimeError(
                "MeZOTrainer.mezo: train() makes the optimizer; call train() or create_optimizer() first"
            )
        return optimizer

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            whole: Any = self.model if model is None else model
            decaying = set(self.get_decay_parameter_names(whole))
            pairs = [(name, p) for name, p in whole.named_parameters() if p.requires_grad]
            groups = [
                {"params": [pair for pair in pairs if (pair[0] in decaying) == decays], "weight_decay": decay}
                for decays, decay in ((True, self.args.weight_decay), (False, 0.0))
            ]
            defaults = {
                "params": [group for group in groups if group["params"]],
                "lr": self.args.learning_rate,
                "seed": self.args.seed,
                "model": whole,
            }
            if self.args.world_size > 1 and not self.is_fsdp_enabled and self._mezo_options.get("parallel") != "none":
                defaults["process_group"] = torch.distributed.group.WORLD
            self.optimizer = _MeZOInLoop(**{**defaults, **self._mezo_options})
        return self.optimizer

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._micro_batches.clear()  # of a run that was interrupted
        output = super().train(*args, **kwargs)
        self.mezo.log.close()  # of ``log_file``; another run goes on in it
        return output

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Keep the batch; with the last batch of a step, take the step and return the mean of the evaluations."""
        model.train()
        wrapper: Any = self.optimizer
        if getattr(wrapper, "scaler", None) is not None:
            wrapper.scaler = None  # fp16: there is no gradient to scale, and GradScaler raises without one
        self._micro_batches.append(self._prepare_inputs(inputs))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        batches, self._micro_batches = self._micro_batches, []
        share = 1 if self._loss_is_of_all_batches(num_items_in_batch) else len(batches)

        def loss_of(batch: dict[str, Any]) -> Tensor:
            own, items = copy_of((batch, num_items_in_batch))
            with self.compute_loss_context_manager():
                loss: Any = self.compute_loss(model, own, num_items_in_batch=items)
            mean: Tensor = loss.mean()
            return mean / share

        def loss() -> Tensor:
            first, *others = batches
            total = loss_of(first)
            for batch in others:
                total = total + loss_of(batch)
            return total

        return torch.as_tensor(self.mezo.step(loss), device=self.args.device)

    def _loss_is_of_all_batches(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Whether ``compute_loss`` divides by the number of items of all batches of the step, as Trainer decides it."""
        scaled: bool | None = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is not None:
            return scaled
        return (self.model_accepts_loss_kwargs and num_items_in_batch is not None) or self.compute_loss_func is not None
