"""What an optimizer can tell of itself. Other code asks here and never tests an optimizer's class.

An optimizer answers by attributes of these names. Each is optional, and the default fits the optimizers of torch.optim.

==========================  ===========  ===============================================================================
attribute                   default      meaning
==========================  ===========  ===============================================================================
``needs_gradients``         True         ``step()`` moves a parameter by its gradient
``replayable``              False        a log replays the run, so nobody else may change weights or state between steps
``state_is_replayed``       False        replay rebuilds the state too, so nobody may drop a parameter's state
``free_state(p)``           state.pop    drops a parameter's state, and whatever else holds its memory
``optimizer_of(p)``         itself       the optimizer that holds a parameter's state
``kept_by_reset``           nothing      state entries that are no moments and survive a reset of moments
==========================  ===========  ===============================================================================
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def needs_gradients(optimizer: Optimizer) -> bool:
    return bool(getattr(optimizer, "needs_gradients", True))


def replayable(optimizer: Optimizer) -> bool:
    return bool(getattr(optimizer, "replayable", False))


def state_is_replayed(optimizer: Optimizer) -> bool:
    return bool(getattr(optimizer, "state_is_replayed", False))


def free_state(optimizer: Optimizer, p: Tensor) -> None:
    own: Any = getattr(optimizer, "free_state", None)
    if own is None:
        optimizer.state.pop(p, None)
    else:
        own(p)


def moves_in_backward(optimizer: Optimizer) -> bool:
    """Whether each parameter has an optimizer of its own, which steps during the backward pass."""
    return hasattr(optimizer, "optimizer_of")


def holder(optimizer: Optimizer, p: Tensor) -> Optimizer:
    """The optimizer that holds a parameter's state."""
    own: Any = getattr(optimizer, "optimizer_of", None)
    return optimizer if own is None else own(p)


def kept_by_reset(optimizer: Optimizer) -> Set[str]:
    kept: Set[str] = getattr(optimizer, "kept_by_reset", frozenset())
    return kept
