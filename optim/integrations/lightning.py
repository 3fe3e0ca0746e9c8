"""MeZO in Lightning."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch

from leanops.integrations.batches import copy_of
from leanops.optim.common.capabilities import needs_gradients

try:
    from lightning.pytorch import Callback
except ImportError:
    try:
        from pytorch_lightning import Callback  # type: ignore[assignment]
    except ImportError as error:
        raise ImportError(
            "leanops.integrations.lightning: lightning must be installed, as in pip install lightning"
        ) from error

__all__ = ["MeZOCallback"]


class MeZOCallback(Callback):
    """Lets Lightning's automatic optimization train with :class:`leanops.optim.MeZO`.

    ::

        class Classifier(LightningModule):  # training_step returns the loss, as for any optimizer
            def configure_optimizers(self):
                return MeZO(self.parameters(), lr=1e-6, model=self)

        Trainer(callbacks=[MeZOCallback()]).fit(Classifier(), data)

    Lightning's closure runs ``training_step``, ``zero_grad`` and ``backward``. During ``fit``, the callback makes
    ``backward`` do nothing, and runs ``training_step`` without grad on a copy of the batch. So a step keeps no
    activations, and every evaluation gets the same inputs, whatever ``training_step`` does to them.
    Schedules, logging, validation and checkpoints are Lightning's own. A checkpoint of the end of an epoch resumes to
    the same bits where the model draws no random numbers: Lightning saves neither generators nor the place in an
    ordinary DataLoader.
    ``training_step`` runs once for each evaluation, so ``self.log`` in it sees the loss at perturbed weights.

    Raises:
        ValueError: when training starts: manual optimization, several optimizers or one that needs gradients,
            ``accumulate_grad_batches`` above 1, ``gradient_clip_val``, the precision ``16-mixed``, a ``training_step``
            that takes ``dataloader_iter``, or a second MeZOCallback.
    """

    def __init__(self) -> None:
        super().__init__()
        self._replaced: list[tuple[str, Any]] = []  # a name, and the instance's own attribute that was there, or None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        _check(trainer, pl_module)
        step = pl_module.training_step

        @functools.wraps(step)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            own_args, own_kwargs = copy_of((args, kwargs))
            with torch.no_grad():
                return step(*own_args, **own_kwargs)

        self._replace(pl_module, "training_step", training_step)
        self._replace(pl_module, "backward", _no_backward)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.accumulate_grad_batches != 1:  # a scheduler of accumulation may change it between epochs
            raise ValueError(
                "MeZOCallback: accumulate_grad_batches must be 1, because there are no gradients to accumulate (take a "
                f"larger batch, or more directions), got {trainer.accumulate_grad_batches}"
            )

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._restore(pl_module)
        trainer.optimizers[0].log.close()  # of ``log_file``; another run goes on in it

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._restore(pl_module)

    def _replace(self, module: Any, name: str, function: Any) -> None:
        """Set an attribute of the instance, which hides the class's method."""
        self._replaced.append((name, vars(module).get(name)))
        setattr(module, name, function)

    def _restore(self, module: Any) -> None:
        while self._replaced:
            name, own = self._replaced.pop()
            if own is None:
                delattr(module, name)
            else:
                setattr(module, name, own)


def _no_backward(*args: Any, **kwargs: Any) -> None:
    """In place of ``LightningModule.backward``."""


def _check(trainer: Any, module: Any) -> None:
    if not module.automatic_optimization:
        raise ValueError(
            "MeZOCallback: automatic_optimization must be True, got False; in manual optimization, training_step calls "
            "step(closure) itself"
        )
    if (count := sum(isinstance(c, MeZOCallback) for c in trainer.callbacks)) != 1:
        raise ValueError(f"MeZOCallback: callbacks must hold one MeZOCallback, got {count}")
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise ValueError(
            "MeZOCallback: training_step must take a batch, because every evaluation of a step needs the same one, got "
            "dataloader_iter"
        )
    kinds = [type(optimizer).__name__ for optimizer in trainer.optimizers]
    if len(kinds) != 1 or needs_gradients(trainer.optimizers[0]):
        raise ValueError(f"MeZOCallback: configure_optimizers must return one MeZO, got {', '.join(kinds) or None}")
    if trainer.gradient_clip_val:
        raise ValueError(
            "MeZOCallback: gradient_clip_val must be None, because there is no gradient, got "
            f"{trainer.gradient_clip_val}"
        )
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise ValueError(
            "MeZOCallback: precision must not be '16-mixed', whose GradScaler needs gradients; use 'bf16-mixed', "
            "'16-true' or 'bf16-true'"
        )
