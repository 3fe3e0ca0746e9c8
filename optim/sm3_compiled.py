"""SM3's step as torch.compile traces it: the operator in the graph, and a learning rate that is read when it runs."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

from leanops.optim import params as managed
from leanops.optim.sm3_calls import check_step, home_of_step, name_of, numbers, rate, rounding_start, scaler
from leanops.optim.sm3_state import complete

_live: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_keys = itertools.count()

# A number that a graph reads as a constant is guarded, and each new one compiles anew. This operator reads a group's lr
# when the graph runs, whoever has set it since.
_library = torch.library.Library("leanops", "FRAGMENT")
_library.define("_sm3_lr(Tensor like, int optimizer, int group) -> Tensor")


def _lr(like: Tensor, optimizer: int, group: int) -> Tensor:
    value = _live[optimizer].param_groups[group]["lr"]
    return torch.as_tensor(value, dtype=torch.float64, device="cpu").reshape(())


_library.impl("_sm3_lr", _lr, "CompositeExplicitAutograd")
torch.library.register_fake(
    "leanops::_sm3_lr", lambda like, optimizer, group: torch.empty((), dtype=torch.float64), lib=_library
)


def enlist(optimizer: Any) -> int:
    """A number by which a graph finds the optimizer again."""
    key = next(_keys)
    _live[key] = optimizer
    return key


def _prepare(key: int, index: int) -> bool:
    """While a group's step is traced: refuse what does not fit, make the state. Whether the lr is a tensor."""
    optimizer = _live[key]
    group = optimizer.param_groups[index]
    numbers(group)
    params = group["params"]
    if len({id(p) for p in params}) != len(params):
        raise ValueError("SM3: a parameter that comes twice in a group cannot be compiled")
    position = sum(len(g["params"]) for g in optimizer.param_groups[:index])
    moved = [(place, p) for place, p in enumerate(params) if p.grad is not None]
    for place, p in moved:
        if managed.is_sharded(p):
            raise ValueError("SM3: a step on sharded parameters cannot be compiled; compile the model and call step()")
        check_step(name_of(group, place, position + place), p, p.grad)
    for _, p in moved:
        state = optimizer.state.setdefault(p, {})
        complete(state, p.detach(), bool(group["momentum"]), group["momentum_dtype"])
        # each on its own: views of one tensor, as eager steps leave them, would be compared pair by pair
        state["step"] = torch.as_tensor(state["step"]).detach().to(home_of_step(group, p.device), copy=True)
    return isinstance(group["lr"], Tensor)


def _start(seed: int) -> int:
    return rounding_start(seed)


# what torch.compiler.assume_constant_result sets, which would import the compiler with this package: the functions run
# while a graph is traced, and their results are constants in it
_prepare._dynamo_marked_constant = True  # type: ignore[attr-defined]
_start._dynamo_marked_constant = True  # type: ignore[attr-defined]


def traced_step(optimizer: Any, key: int, like: Tensor) -> None:
    """The step of an optimizer on plain tensors, written for the tracer: lists, and one operator a group and device."""
    # not optimizer.param_groups: the tracer would guard every value in it, the learning rate among them
    groups = optimizer.__dict__["param_groups"]
    fixed = [_prepare(key, index) for index in range(len(groups))]
    # all gradients before any state: through the keys of the state, the tracer would guard which tensor a gradient is
    moved = [[(i, p, p.grad) for i, p in enumerate(g["params"]) if p.grad is not None] for g in groups]
    position = 0
    for index, group in enumerate(groups):
        lr = group["lr"] if fixed[index] else torch.ops.leanops._sm3_lr(like, key, index)
        first = group.get("tensor_id", position)
        devices: list[torch.device] = []
        for _, p, _ in moved[index]:
            if p.device not in devices:
                devices.append(p.device)
        for device in devices:
            _traced_call(optimizer, group, [m for m in moved[index] if m[1].device == device], first, device, lr)
        position += len(group["params"])


def _traced_call(
    optimizer: Any,
    group: dict[str, Any],
    moved: list[tuple[int, Tensor, Tensor]],
    first: int,
    device: torch.device,
    lr: Tensor,
) -> None:
    params, grads, covers, momenta, scales, ids, steps = [], [], [], [], [], [], []
    n = numbers(group)
    for place, p, g in moved:
        state = optimizer.state[p]
        params.append(p)
        grads.append(g)
        covers.append(state["cover"])
        steps.append(state["step"])
        ids.append(first + place)
        if n.momentum:
            momenta.append(state["momentum_buffer"])
            scales.append(state["momentum_scale"] if "momentum_scale" in state else state["cover"].new_empty(0))
    found_inf = scaler(getattr(optimizer, "found_inf", None), device)
    if n.stochastic_rounding:
        seed = torch.stack(steps).amax().to(torch.int64) + _start(group["seed"])
    else:
        seed = torch.zeros((), dtype=torch.int64)
    torch.ops.leanops.sm3_step_(
        params,
        grads,
        covers,
        momenta,
        scales,
        rate(lr, device),
        seed,
        scaler(getattr(optimizer, "grad_scale", None), device),
        found_inf,
        ids,
        [0] * len(ids),
        *n,
    )
    if found_inf is None:
        torch._foreach_add_(steps, 1)
    else:
        torch._foreach_add_(steps, (found_inf.to(steps[0].device).reshape(()) == 0).float())
