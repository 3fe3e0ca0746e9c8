"""SM3's step as torch.compile traces it: the operator in the graph, and operators that read numbers when it runs."""

from __future__ import annotations

import itertools
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leanops.common.call import flat
from leanops.common.checks import rate_is_one_number
from leanops.optim.common import parameters
from leanops.optim.sm3.calls import OPERATOR
from leanops.optim.sm3.options import (
    averages_gradient,
    cover_warmup,
    device_of_step,
    momentum_dtype,
    name_of,
    options_of,
    rate,
    rounding_start,
    scaler,
    warming_options,
)
from leanops.optim.sm3.refusals import check_step
from leanops.optim.sm3.state import complete, new_momentum_weights, number
from leanops.optim.sm3.warmup import are_warming, is_over

_live: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
_keys = itertools.count()

# torch.compile guards a number that a graph reads as a constant, and compiles anew for another value. So operators read
# a group's lr and momentum, which schedules change, when the graph runs. They read its seed, too: an integer that
# differs between optimizers is no constant to the tracer. The momentum reaches sm3_step_ through an operator that takes
# it as a tensor.
_library = torch.library.Library("leanops", "FRAGMENT")
_library.define("_sm3_compiled_step_" + OPERATOR.schema.replace("float momentum", "Tensor momentum"))


def _group(optimizer: str, group: int) -> dict[str, Any]:
    """A group, after a check of all groups: a graph may move one group before it reads the numbers of the next."""
    groups: list[dict[str, Any]] = _live[optimizer].param_groups
    for g in groups:
        options_of(g)
        rate_is_one_number("SM3", g["lr"])
    return groups[group]


def _lr(like: Tensor, optimizer: str, group: int) -> Tensor:
    value = rate(_group(optimizer, group)["lr"], like.device)
    return value.to("cpu", torch.float64, copy=True).reshape(())


def _momentum(like: Tensor, optimizer: str, group: int) -> Tensor:
    return torch.tensor(options_of(_group(optimizer, group)).momentum, dtype=torch.float64, device="cpu")


def _warming_lr(steps: Tensor, optimizer: str, group: int) -> Tensor:
    """The rate of a step that fills covers, 0. After the last such step the optimizer takes another key. The graph has
    the old key as a constant, so the next step compiles anew."""
    own = _live[optimizer]
    if own._key == optimizer and is_over(_group(optimizer, group), steps, 1):
        own._key = enlist(own)
    return torch.zeros((), dtype=torch.float64, device="cpu")


def _momentum_weights(weights: Tensor, momentum: Tensor) -> tuple[Tensor, Tensor]:
    return new_momentum_weights(weights, momentum.item())


def _start(like: Tensor, optimizer: str, group: int) -> Tensor:
    start = rounding_start(_live[optimizer].param_groups[group]["seed"])
    return torch.tensor(start, dtype=torch.int64, device="cpu")


def _step(*args: Any) -> None:
    """``sm3_step_`` with the momentum as a tensor. If the momentum has become 0, the momenta stay as they are."""
    call = OPERATOR.bind(*args)
    momentum = call.options.momentum.item()
    if not momentum:
        call = call._replace(momenta=[], scales=[])
    OPERATOR.op(*flat(call._replace(options=call.options._replace(momentum=momentum))))


for _name, _read, _dtype in (
    ("_sm3_lr", _lr, torch.float64),
    ("_sm3_momentum", _momentum, torch.float64),
    ("_sm3_start", _start, torch.int64),
):
    _library.define(f"{_name}(Tensor like, str optimizer, int group) -> Tensor")
    _library.impl(_name, _read, "CompositeExplicitAutograd")
    torch.library.register_fake(
        f"leanops::{_name}",
        lambda like, optimizer, group, dtype=_dtype: torch.empty((), dtype=dtype, device="cpu"),
        lib=_library,
    )
_library.define("_sm3_warming_lr(Tensor steps, str optimizer, int group) -> Tensor")
_library.impl("_sm3_warming_lr", _warming_lr, "CompositeExplicitAutograd")
torch.library.register_fake(
    "leanops::_sm3_warming_lr",
    lambda steps, optimizer, group: torch.empty((), dtype=torch.float64, device="cpu"),
    lib=_library,
)
_library.define("_sm3_momentum_weights(Tensor weights, Tensor momentum) -> (Tensor, Tensor)")
_library.impl("_sm3_momentum_weights", _momentum_weights, "CompositeExplicitAutograd")
torch.library.register_fake(
    "leanops::_sm3_momentum_weights", lambda weights, momentum: (weights.clone(), weights.clone()), lib=_library
)
_library.impl("_sm3_compiled_step_", _step, "CompositeExplicitAutograd")
torch.library.register_fake("leanops::_sm3_compiled_step_", lambda *args: None, lib=_library)


def enlist(optimizer: Any) -> str:
    """The key by which a graph finds the optimizer. It is text: an integer that differs between optimizers is no
    constant to the tracer."""
    key = str(next(_keys))
    _live[key] = optimizer
    return key


def _prepare(key: str, index: int) -> tuple[bool, bool, bool, int, tuple[int, ...]]:
    """Called while a group's step is traced: check parameters and gradients, and make the state. Returns whether the lr
    is a tensor, whether there is momentum, whether it is of the gradient, ``cover_warmup``, and the places of the
    parameters that still warm up."""
    optimizer = _live[key]
    group = optimizer.param_groups[index]
    options_of(group)
    params = group["params"]
    if len({id(p) for p in params}) != len(params):
        raise ValueError("SM3: a parameter that comes twice in a group cannot be compiled")
    position = sum(len(g["params"]) for g in optimizer.param_groups[:index])
    moved = [(place, p) for place, p in enumerate(params) if p.grad is not None]
    for place, p in moved:
        if parameters.is_sharded(p):
            raise ValueError("SM3: a step on sharded parameters cannot be compiled; compile the model and call step()")
        check_step(name_of(group, place, position + place), p, p.grad)
    momentum, dtype, of_gradient = bool(group["momentum"]), momentum_dtype(group), averages_gradient(group)
    warming: list[int] = []
    for device in {p.device for _, p in moved}:
        here = [(place, p) for place, p in moved if p.device == device]
        flags = are_warming(group, [optimizer.state.get(p, {}) for _, p in here], device)
        warming += [place for (place, _), flag in zip(here, flags, strict=True) if flag]
    for place, p in moved:
        state = optimizer.state.setdefault(p, {})
        complete(state, p.detach(), momentum and place not in warming, dtype, of_gradient)
        # a copy for each parameter: the tracer would compare views of one tensor, as eager steps leave, pair by pair
        for name in {"step", "momentum_weight"} & state.keys():
            state[name] = number(state[name]).detach().to(device_of_step(group, p.device), copy=True)
    return isinstance(group["lr"], Tensor), momentum, momentum and of_gradient, cover_warmup(group), tuple(warming)


# torch.compiler.assume_constant_result sets this, but would import the compiler with this package. The function runs
# while a graph is traced, and its results are constants of the graph
_prepare._dynamo_marked_constant = True  # type: ignore[attr-defined]


def traced_step(optimizer: Any, key: str, like: Tensor) -> None:
    """The step of an optimizer on plain tensors, written for the tracer: lists, and one operator a group and device."""
    # of optimizer.param_groups, the tracer would guard every value, the learning rate among them
    groups = optimizer.__dict__["param_groups"]
    fixed = [_prepare(key, index) for index in range(len(groups))]
    # read all gradients before any state: after it, the tracer would guard which tensor each gradient is
    moved = [[(i, p, p.grad) for i, p in enumerate(g["params"]) if p.grad is not None] for g in groups]
    position = 0
    for index, group in enumerate(groups):
        is_tensor, moves, of_gradient, count, warming = fixed[index]
        if group["cover_warmup"] != count:  # never true: the tracer guards the number, and another one compiles anew
            raise RuntimeError("SM3: cover_warmup has changed while a step was compiled")
        lr = group["lr"] if is_tensor else torch.ops.leanops._sm3_lr(like, key, index)
        momentum = torch.ops.leanops._sm3_momentum(like, key, index) if moves else None
        start = torch.ops.leanops._sm3_start(like, key, index) if group["stochastic_rounding"] else None
        first = group.get("tensor_id", position)
        devices: list[torch.device] = []
        for _, p, _ in moved[index]:
            if p.device not in devices:
                devices.append(p.device)
        for device in devices:
            warming_items = [m for m in moved[index] if m[1].device == device and m[0] in warming]
            if warming_items:
                call_options = _CallOptions(key, index, first, device, None, None, None, False)
                _traced_call(optimizer, group, warming_items, call_options)
            items = [m for m in moved[index] if m[1].device == device and m[0] not in warming]
            if items:
                call_options = _CallOptions(key, index, first, device, lr, momentum, start, of_gradient)
                _traced_call(optimizer, group, items, call_options)
        position += len(group["params"])


class _CallOptions(NamedTuple):
    """The arguments of a traced call besides its parameters."""

    key: str
    group_index: int
    first_id: int  # the group's first tensor id
    device: torch.device
    lr: Tensor | None  # None: the parameters warm up
    momentum: Tensor | None  # None where it is 0, a constant of the graph
    start: Tensor | None  # the first step's seed of stochastic rounding
    of_gradient: bool


def _traced_call(
    optimizer: Any, group: dict[str, Any], moved: list[tuple[int, Tensor, Tensor]], call_options: _CallOptions
) -> None:
    key, group_index, first_id, device, lr, momentum, start, of_gradient = call_options
    params, grads, covers, momenta, scales, momentum_weights, ids, steps = [], [], [], [], [], [], [], []
    if lr is None:
        options = warming_options(group)
    else:
        options = options_of(group) if momentum is None else options_of(group, 0.0)
    for place, p, g in moved:
        state = optimizer.state[p]
        params.append(p)
        grads.append(g)
        covers.append(state["cover"])
        steps.append(state["step"])
        ids.append(first_id + place)
        if momentum is not None:
            momenta.append(state["momentum_buffer"])
            scales.append(state["momentum_scale"] if "momentum_scale" in state else state["cover"].new_empty(0))
            if of_gradient:
                momentum_weights.append(state["momentum_weight"])
    found_inf = scaler(getattr(optimizer, "found_inf", None), device)
    if start is None:
        seed = torch.zeros((), dtype=torch.int64, device="cpu")
    else:
        seed = torch.stack(steps).amax().to(torch.int64) + start
    if lr is None:
        lr = torch.ops.leanops._sm3_warming_lr(torch.stack(steps), key, group_index)
    factors = None
    if momentum_weights:
        old = torch.stack(momentum_weights)
        new, factors = torch.ops.leanops._sm3_momentum_weights(old, momentum)
    step = torch.ops.leanops.sm3_step_ if momentum is None else torch.ops.leanops._sm3_compiled_step_
    step(
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
        options.momentum if momentum is None else momentum,
        *options[1:],
        factors,
    )
    if found_inf is None:
        torch._foreach_add_(steps, 1)
        if momentum_weights:
            torch._foreach_copy_(momentum_weights, list(new.unbind()))
    else:
        taken = found_inf.to(steps[0].device).reshape(()) == 0
        torch._foreach_add_(steps, taken.float())
        if momentum_weights:
            torch._foreach_copy_(momentum_weights, list(torch.where(taken, new, old).unbind()))
