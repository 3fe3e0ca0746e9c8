"""What a step says of a closure that changes its own inputs, or calls backward()."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from types import CodeType
from typing import Any

import torch
from torch import Tensor

_BACKWARD: CodeType = torch.autograd.backward.__code__


def explain(op: str, error: Exception, closure: Callable[[], Any], evaluated: int) -> None:
    """Add a note to an error of the closure where the reason is known. Python 3.10 has no notes: a warning says it.

    Args:
        evaluated: the evaluations of the step that went well before this one.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return
    if _in_backward(error):
        text = _calls_backward(op, closure)
    elif evaluated:
        text = (
            f"{op}: evaluation {evaluated + 1} of the closure in this step failed, and the evaluation before it did "
            "not. A step calls the closure several times, and each call must find the same inputs: the closure must "
            "not pop() from its batch, exhaust an iterator, or write into its tensors. Give each call a copy of what "
            "it changes, such as dict(batch)"
        )
    else:
        return
    add_note = getattr(error, "add_note", None)
    if add_note is None:
        warnings.warn(text, stacklevel=2)
    else:
        add_note(text)


def look_for_backward(op: str, closure: Callable[[], Any], params: Sequence[Tensor]) -> None:
    """Warn where an evaluation has left a gradient in a parameter that had none; RuntimeError for Lightning's closure,
    which always does."""
    if all(p.grad is None for p in params):
        return
    text = _calls_backward(op, closure)
    if _is_lightnings(closure):
        raise RuntimeError(text)
    warnings.warn(text, stacklevel=2)


def _calls_backward(op: str, closure: Callable[[], Any]) -> str:
    text = (
        f"{op}: the closure calls backward(), which costs the time and the memory that a step without gradients saves. "
        "It must only return the loss"
    )
    if _is_lightnings(closure):
        text += (
            ". Lightning's automatic optimization made this closure: add "
            "leanops.integrations.lightning.MeZOCallback() to the trainer's callbacks"
        )
    return text


def _is_lightnings(closure: Any) -> bool:
    while isinstance(closure, functools.partial):
        closure = closure.func
    module: str = getattr(closure, "__module__", None) or ""
    return module.split(".")[0] in ("lightning", "pytorch_lightning")


def _in_backward(error: Exception) -> bool:
    frame = error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code is _BACKWARD:
            return True
        frame = frame.tb_next
    return False
