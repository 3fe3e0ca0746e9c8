"""Reset an optimizer's moments without making a new optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from leanops.optim.common import capabilities
from leanops.optim.common.parameters import PLAIN, is_sharded

# Start values of the state entries of torch's optimizers and SM3. Both parts of a complex entry start there. A string
# names the group's option that holds the start value.
_START: dict[str, float | str] = {
    "step": 0,
    # Adam, AdamW, RAdam, NAdam, Adamax, SparseAdam
    "exp_avg": 0,
    "exp_avg_sq": 0,
    "max_exp_avg_sq": 0,
    "exp_inf": 0,
    "mu_product": 1,
    # SGD, Muon, RMSprop, Adadelta, Adafactor
    "momentum_buffer": 0,
    "square_avg": 0,
    "grad_avg": 0,
    "acc_delta": 0,
    "row_var": 0,
    "col_var": 0,
    "variance": 0,
    # Adagrad, ASGD, Rprop
    "sum": "initial_accumulator_value",
    "eta": "lr",
    "mu": 1,
    "ax": 0,
    "prev": 0,
    "step_size": "lr",
    # SM3 in int8; its covers are no moments, see _is_cover
    "momentum_scale": 0,
    "momentum_weight": 0,
}


@torch.no_grad()
def reset_momentum_(optimizer: Any, *, covers: bool = False) -> None:
    r"""Reset moments **and** step counts to their start values, in place. Weights and options stay.

    .. math:: m \leftarrow 0, \qquad v \leftarrow 0, \qquad t \leftarrow 0

    The next step equals the first step of a new optimizer (SM3 keeps the covers of the run). The count matters: Adam
    divides by :math:`1 - \beta^t`, so moments of 0 with an old count make the next update too large, by
    :math:`(1 - \beta_1) / \sqrt{1 - \beta_2}`, 3.2 times at (0.9, 0.999). Call it every few hundred steps, as published
    for low-rank pre-training. Call it also after weights were rewritten (a refactorization), because old moments then
    belong to coordinates that no longer exist.

    A count in the parameter group (``group["step"]``, as in pytorch_optimizer) is also set to 0. Other values that an
    optimizer keeps in the group (schedule-free averages, Prodigy's d) stay.

    Every entry is set in place. Addresses stay, so captured graphs stay valid:

    - to 0: exp_avg, exp_avg_sq, max_exp_avg_sq, exp_inf, momentum_buffer and its scale, square_avg, grad_avg,
      acc_delta, row_var, col_var, variance, prev, ax and step;
    - to 1: mu_product and mu;
    - sum to ``initial_accumulator_value``, eta and step_size to lr;
    - entries that are None stay None.

    **A parameter with any other entry**, or with an entry of a special tensor type (torchao's quantized moments), loses
    its whole state, and the optimizer makes it anew at the next step. No state is kept in part.

    Args:
        optimizer: a torch optimizer.
        covers: reset the accumulators of :class:`SM3` too. By default they stay, because they are sums over the run.
            SM3's step count stays in either case: it numbers the random bits of stochastic rounding, and no bias
            correction depends on it.

    Raises:
        TypeError: not an optimizer.
        ValueError: MeZO, because its log would no longer replay; covers=True for an optimizer whose state has no
            covers. Nothing is changed then.

    Source: momentum reset in 2505.22922.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"reset_momentum_: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if capabilities.replayable(optimizer):
        kind = type(optimizer).__name__
        raise ValueError(f"reset_momentum_: optimizer must not be {kind}: its log would no longer replay")
    # optimizer.state may also hold the optimizer's own values, under names instead of parameters
    keys = {key for p, state in optimizer.state.items() if isinstance(p, Tensor) for key in state}
    if covers and keys and not any(map(_is_cover, keys)):
        raise ValueError(
            f"reset_momentum_: covers must be False for an optimizer without covers, got True for "
            f"{type(optimizer).__name__}"
        )
    plan, owners = [], {id(optimizer): optimizer}
    for group in optimizer.param_groups:
        for p in group["params"]:
            own = capabilities.holder(optimizer, p)
            owners[id(own)] = own
            if own.state.get(p):
                plan.append((own, p, _starts(own, group, own.state[p], covers)))
    for own, p, starts in plan:
        if starts is None:
            del own.state[p]
        else:
            _set(own.state[p], starts)
    for own in owners.values():
        for group in own.param_groups:
            if isinstance(group.get("step"), int | float | Tensor):  # counted once for the whole group
                _set(group, {"step": 0})


def _starts(own: Optimizer, group: dict[str, Any], state: dict[str, Any], covers: bool) -> dict[str, float] | None:
    """Start values of the entries to reset. None if one is unknown or an entry cannot be set in place."""
    found: dict[str, float] = {}
    for key, value in state.items():
        start = 0 if _is_cover(key) else _START.get(key)
        start = group.get(start) if isinstance(start, str) else start
        if start is None or not (value is None or isinstance(value, int | float) or _is_plain(value)):
            return None
        if value is not None and (covers or not _is_cover(key)) and key not in capabilities.kept_by_reset(own):
            found[key] = float(start)
    return found


def _set(entries: dict[str, Any], starts: dict[str, float]) -> None:
    for key, start in starts.items():
        value = entries[key]
        if isinstance(value, Tensor):
            (torch.view_as_real(value) if value.is_complex() else value).fill_(start)
        else:
            entries[key] = type(value)(start)


def _is_plain(value: Any) -> bool:
    local = value.to_local() if is_sharded(value) else value
    return type(local) in PLAIN


def _is_cover(key: Any) -> bool:
    return isinstance(key, str) and key.startswith("cover")
