"""LISA, HalfFineTuning and TensorSelector in Hugging Face's Trainer."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from typing import Any

import torch

from leanops.optim.selection.rounds import Rounds, at_least
from leanops.optim.selection.tensor_selector import TensorSelector

Loss = Callable[[Any, Any], torch.Tensor]


def trainer_callback(kind: type[Rounds] | type[TensorSelector], **options: Any) -> Any:
    """A ``transformers.TrainerCallback`` that runs LISA, HalfFineTuning or TensorSelector in a Trainer.

    ::

        Trainer(model, args, train_dataset=data, callbacks=[trainer_callback(LISA, active=2, period=20)])
        Trainer(model, args, train_dataset=data, callbacks=[trainer_callback(TensorSelector, rho=0.5, period=500)])

    The position is the trainer's own ``global_step``. So ``resume_from_checkpoint`` continues with the same draws, in
    the middle of a round too. ``callback.selection`` is the LISA, HalfFineTuning or TensorSelector during training. At
    the end, and at the start of a run after an interrupted one, all parameters require grad again.

    **TensorSelector** selects before step 0 and then every ``period`` steps, on a batch of ``args.train_batch_size``
    rows, which it draws from the training data by ``seed`` and the step. The trainer's own batches and torch's random
    numbers stay what they are without it. While the learning rate is 0 (the first step of a warm-up), no tensor is
    important, and the selection waits for the next step. The checkpoint's ``trainer_state.json`` holds the selection.

    Args:
        kind: :class:`LISA`, :class:`HalfFineTuning` or :class:`TensorSelector`.
        options: the class's keyword arguments; HalfFineTuning and TensorSelector need ``period``. For TensorSelector
            also ``seed`` (0), and ``loss``, a function of the model and a batch that returns the loss; by default the
            loss that the model returns.

    Raises:
        TypeError: another kind; training data without length or rows by index.
        ValueError: no period; a model that returns no loss, without ``loss``.
        ImportError: transformers is not installed.
    """
    if isinstance(kind, type) and issubclass(kind, Rounds):
        return _rounds_callback(kind, options)
    if isinstance(kind, type) and issubclass(kind, TensorSelector):
        return _selector_callback(kind, **options)
    raise TypeError(f"trainer_callback: kind must be LISA, HalfFineTuning or TensorSelector, got {kind!r}")


def _need_period(period: object) -> None:
    if period is None:
        raise ValueError("trainer_callback: period must be given, because rounds follow the trainer's steps, got None")


def _rounds_callback(kind: type[Rounds], options: dict[str, Any]) -> Any:
    from transformers import TrainerCallback

    _need_period(options.get("period", inspect.signature(kind).parameters["period"].default))

    class SelectionCallback(TrainerCallback):  # type: ignore[misc]
        selection: Rounds | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.selection is not None:
                self.selection.release()  # an interrupted run has not released it
            self.selection = kind(kwargs["model"], kwargs["optimizer"], **options)
            self.selection.seek(state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert self.selection is not None
            self.selection.step()

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.selection is not None:
                self.selection.release()

    return SelectionCallback()


def _selector_callback(
    kind: type[TensorSelector], *, period: int | None = None, seed: int = 0, loss: Loss | None = None, **options: Any
) -> Any:
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState

    _need_period(period)
    steps = at_least("trainer_callback", "period", period, 1)
    loss_of = _model_loss if loss is None else loss

    class TensorSelectorCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
        selection: TensorSelector | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.selection is not None:
                self.selection.release()  # an interrupted run has not released it
            self.selection = kind(kwargs["model"], kwargs["optimizer"], **options)
            saved = state.stateful_callbacks.get(type(self).__name__)
            if state.global_step and saved:
                self.selection.load_state_dict(saved["attributes"]["selector"])

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert self.selection is not None
            due = state.global_step % steps == 0 or self.selection.selection is None
            if due and any(group["lr"] > 0 for group in kwargs["optimizer"].param_groups):
                with torch.random.fork_rng(devices=[]):  # rows may draw random numbers
                    batch = _draw(kwargs["train_dataloader"], args, f"{seed} {state.global_step}")
                model = kwargs["model"].train()
                self.selection.select(lambda: loss_of(model, batch))

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.selection is not None:
                self.selection.release()

        def state(self) -> dict[str, Any]:
            """What ``trainer_state.json`` keeps."""
            selector = None if self.selection is None else self.selection.state_dict()
            return {"args": {}, "attributes": {"selector": selector}}

    return TensorSelectorCallback()


def _draw(loader: Any, args: Any, seed: str) -> Any:
    """A batch of the training data, on the trainer's device; its rows follow from the seed."""
    from accelerate.utils import send_to_device

    data = loader.dataset
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise TypeError(
            "trainer_callback: train_dataset must have a length and rows by index for TensorSelector to draw a batch, "
            f"got {type(data).__name__}; call TensorSelector.select in a callback of your own"
        )
    rows = random.Random(seed).sample(range(len(data)), min(args.train_batch_size, len(data)))
    return send_to_device(loader.collate_fn([data[i] for i in rows]), args.device)


def _model_loss(model: Any, batch: Any) -> torch.Tensor:
    outputs = model(**batch)
    loss = outputs.get("loss") if isinstance(outputs, dict) else outputs[0]
    if loss is None:
        raise ValueError(
            "trainer_callback: the model must return a loss from the batch, got outputs "
            f"{', '.join(outputs)}; pass loss=, a function of the model and the batch"
        )
    mean: torch.Tensor = loss.mean()
    return mean
