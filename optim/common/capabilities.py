"""What an optimizer can do. Other code asks here and never tests an optimizer's class.

An optimizer answers by attributes with these names. Each is optional; the defaults fit the optimizers of torch.optim.

==========================  ===========  ===============================================================================
attribute                   default      meaning
==========================  ===========  ===============================================================================
``needs_gradients``         True         ``step()`` moves a parameter by its gradient
``replayable``              False        a log replays the run: no other code may change weights or state between steps
``state_is_replayed``       False        replay rebuilds the state too: no other code may drop a parameter's state
``free_state(p)``           state.pop    drops a parameter's state and every other reference to its memory
``optimizer_of(p)``         itself       the optimizer that holds a parameter's state
``kept_by_reset``           nothing      state entries that are no moments, which a reset of moments keeps
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
    """Whether each parameter has its own optimizer, which steps during the backward pass."""
    return hasattr(optimizer, "optimizer_of")


def holder(optimizer: Optimizer, p: Tensor) -> Optimizer:
    """The optimizer that holds a parameter's state."""
    own: Any = getattr(optimizer, "optimizer_of", None)
    return optimizer if own is None else own(p)


def kept_by_reset(optimizer: Optimizer) -> Set[str]:
    kept: Set[str] = getattr(optimizer, "kept_by_reset", frozenset())
    return kept
