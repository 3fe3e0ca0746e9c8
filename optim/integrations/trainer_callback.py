"""LISA and HalfFineTuning in Hugging Face's Trainer."""

from __future__ import annotations

from typing import Any

from leanops.optim.selection.rounds import Rounds


def trainer_callback(kind: type[Rounds], **options: Any) -> Any:
    """A ``transformers.TrainerCallback`` that runs LISA or HalfFineTuning on the trainer's model and optimizer.

    ::

        Trainer(model, args, train_dataset=data, callbacks=[trainer_callback(LISA, active=2, period=20)])

    The position is the trainer's own ``global_step``. So ``resume_from_checkpoint`` continues with the same draws, in
    the middle of a round too, and the callback saves nothing. ``callback.selection`` is the LISA or HalfFineTuning
    object during training. At the end, and at the start of a run after an interrupted one, all parameters require grad
    again.

    Args:
        kind: :class:`LISA` or :class:`HalfFineTuning`.
        options: the class's keyword arguments; HalfFineTuning needs ``period``.

    Raises:
        TypeError: another kind.
        ValueError: no period.
        ImportError: transformers is not installed.
    """
    from transformers import TrainerCallback

    if not (isinstance(kind, type) and issubclass(kind, Rounds)):
        raise TypeError(f"trainer_callback: kind must be LISA or HalfFineTuning, got {kind!r}")
    if options.get("period", 1) is None or ("period" not in options and kind.__name__ == "HalfFineTuning"):
        raise ValueError("trainer_callback: period must be given, because rounds follow the trainer's steps, got None")

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
