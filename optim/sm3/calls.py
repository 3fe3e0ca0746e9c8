"""The operator calls of an SM3 step: one a group and device, made once and used again while nothing has changed.

To gather and check a thousand small parameters costs more than the kernel's work on them. So a call keeps its lists,
and each step only compares parameters, state and gradients with them: 0.6 us a parameter. After a user has replaced
anything (a parameter's memory or strides, an entry of the state, ...), the next step gathers anew. A call does not hold
the memory of large weights and of their state between steps, because their owner may move it away.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leanops import _registry
from leanops.common.checks import rate_is_one_number
from leanops.optim.common import parameters
from leanops.optim.sm3.options import (
    Group,
    averages_gradient,
    device_of_step,
    momentum_dtype,
    name_of,
    options_of,
    rate,
    rounding_seed,
    scaler,
    warming_options,
)
from leanops.optim.sm3.refusals import check_step, is_plain
from leanops.optim.sm3.sharding import combine_column_covers, local_gradient
from leanops.optim.sm3.state import Part, State, complete, new_momentum_weights, number, part_of
from leanops.optim.sm3.warmup import are_warming, is_over

OPERATOR = _registry.spec("sm3_step_")
_SMALL = 1 << 14  # elements; a step takes about 10 us for them

_dtype, _shape, _layout = map(operator.attrgetter, ("dtype", "shape", "layout"))

Grads = list[list[Tensor | None]]  # of every group's every parameter


class Item(NamedTuple):
    """A parameter that a step moves."""

    place: int  # index of the parameter in its group
    tensor_id: int
    part: Part
    state: State
    state_index: int  # index of the state among all of the optimizer


class Call:
    """One operator call: parameters of one group on one device. The ``step`` of each is a view of one tensor."""

    def __init__(self, group: Group, items: Sequence[Item], device: torch.device, warming: bool) -> None:
        self.device, self.fresh, self.warming = device, True, warming
        places = [i.place for i in items]
        self._places = None if len(places) == len(group["params"]) else places  # None: all of the group, in order
        self._parts = [i.part for i in items]
        self._params = [p.param for p in self._parts]
        self._sharded = any(map(parameters.is_sharded, self._params))
        self._locals = [p.local for p in self._parts]
        self._ids, self._offsets = [i.tensor_id for i in items], [p.offset for p in self._parts]
        self._state_indices = [i.state_index for i in items]
        states = [i.state for i in items]
        self._choices = _choices(group)
        self._momentum, dtype = bool(group["momentum"]) and not warming, momentum_dtype(group)
        of_gradient = self._momentum and averages_gradient(group)
        for state, local in zip(states, self._locals, strict=True):
            complete(state, local, self._momentum, dtype, of_gradient)
        self._empty = torch.empty(0, dtype=torch.float32, device=device)
        lists = self._state(states)
        state_tensors = list(chain.from_iterable(lists))
        self._step_device = device_of_step(group, device)
        self._steps = self._shared(states, "step")
        self._momentum_weights = self._shared(states, "momentum_weight") if of_gradient else None
        if any(map(Tensor.is_inference, state_tensors)) and not torch.is_inference_mode_enabled():
            raise RuntimeError("SM3: state that torch.inference_mode() made cannot be written outside of it; clone it")
        self.plain = is_plain(self._locals) and is_plain(state_tensors)
        self._state_lists = None if any(map(_is_large, state_tensors)) else lists
        entries = list(chain.from_iterable(map(dict.values, states)))
        self._large_entries = [(i, weakref.ref(e)) for i, e in enumerate(entries) if _is_large(e)]
        self._entries = [None if _is_large(e) else e for e in entries]
        # If C++ holds a tensor, too, its release after a call does not take the interpreter's lock, which costs a third
        # of a step on thousands of small tensors. C++ must not hold a parameter: one with an attribute that refers to
        # this object would never be freed. Nor must it hold large memory, which its owner may move between steps.
        with_aliases = self.plain and not self._sharded
        self._set_weights([t.detach() if with_aliases and t.numel() <= _SMALL else t for t in self._locals])
        pairs = list(zip(self._locals, self._weights, strict=True))
        self._small, self._aliases = [t for t, a in pairs if t is not a], [a for t, a in pairs if t is not a]
        self._large = [t for t, a in pairs if t is a]
        if self.plain:
            self._geometries = list(map(_geometry, self._large))
            held = [*self._aliases, *(t for t in state_tensors if not _is_large(t))]
            self._held = torch.ScriptList(held) if held else None
        self._dtypes, self._shapes = list(map(_dtype, self._locals)), list(map(_shape, self._locals))
        self._no_seed = torch.zeros((), dtype=torch.int64, device="cpu")

    def _shared(self, states: Sequence[State], name: str) -> Tensor:
        """One tensor of a number of each state. The states get views of it."""
        together = torch.stack([number(s[name]).detach().to(self._step_device).reshape(()) for s in states])
        for state, view in zip(states, together.unbind(), strict=True):
            state[name] = view
        return together

    def _set_weights(self, weights: list[Tensor]) -> None:
        """Set the weights that the operator takes and, if the state is kept, the tensors whose versions it bumps."""
        self._weights = weights
        lists = self._state_lists
        self._counted = lists and _registry.counted([*weights, *chain.from_iterable(lists)])

    def _state(self, states: Sequence[State]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Covers, momenta and scales, as the operator takes them."""
        momenta = [s["momentum_buffer"] for s in states] if self._momentum else []
        coded = any(m.dtype == torch.int8 for m in momenta)
        scales = [s.get("momentum_scale", self._empty) for s in states] if coded else []
        return [s["cover"] for s in states], momenta, scales

    def pick(self, grads: Sequence[Tensor | None]) -> Sequence[Any]:
        """The gradients of the call's parameters, from those of the group."""
        return grads if self._places is None else [grads[i] for i in self._places]

    def fits(self, group: Group, grads: Sequence[Tensor], states: Sequence[State]) -> bool:
        """Whether a call gathered now, for these gradients of its parameters, would be the same."""
        if not self.plain or (self._steps.is_inference() and not torch.is_inference_mode_enabled()):
            return False
        if _choices(group) != self._choices or device_of_step(group, self.device) != self._step_device:
            return False
        if self.warming and is_over(group, self._steps):
            return False
        entries = list(chain.from_iterable(map(dict.values, map(states.__getitem__, self._state_indices))))
        if len(entries) != len(self._entries):
            return False
        for i, large in self._large_entries:
            if entries[i] is None or entries[i] is not large():
                return False
            entries[i] = None
        if not all(map(operator.is_, entries, self._entries)):
            return False
        if self._sharded:
            self._large = list(map(parameters.local, self._params))
            self._set_weights(self._large)
        if not all(map(Tensor.is_set_to, self._small, self._aliases)):
            return False
        if list(map(_geometry, self._large)) != self._geometries or list(map(_dtype, grads)) != self._dtypes:
            return False
        return list(map(_layout, grads)).count(torch.strided) == len(grads)

    def has_shapes(self, grads: Sequence[Tensor]) -> bool:
        """Whether the gradients, which may be resized in place, have the parameters' shapes. 0.14 us each."""
        return self._sharded or list(map(_shape, grads)) == self._shapes

    def arguments(
        self, group: Group, grads: Sequence[Any], states: Sequence[State], grad_scale: Any, found_inf: Any
    ) -> tuple[Any, ...]:
        """The operator's arguments."""
        if self._sharded or not is_plain(grads):
            grads = [local_gradient(p, g) for p, g in zip(self._params, grads, strict=True)]
        lr, factors = rate(group["lr"], self.device), None
        if self.warming:
            options, lr = warming_options(group), torch.zeros((), dtype=torch.float64, device="cpu")
        else:
            options = options_of(group)
        if self._momentum_weights is not None:
            self._next_weights, factors = new_momentum_weights(self._momentum_weights, options.momentum)
        return (
            self._weights,
            grads,
            *(self._state_lists or self._state([states[i] for i in self._state_indices])),
            lr,
            rounding_seed(group["seed"], self._steps.amax()) if options.stochastic_rounding else self._no_seed,
            scaler(grad_scale, self.device),
            scaler(found_inf, self.device),
            self._ids,
            self._offsets,
            *options,
            factors,
        )

    def run(self, arguments: tuple[Any, ...], found_inf: Any) -> None:
        """Move the parameters and count the step. ``found_inf`` other than 0 prevents both."""
        if self.plain:
            OPERATOR.launch(self.device, *arguments, written=self._counted)
            self.fresh = False
        else:
            OPERATOR.op(*arguments)
        taken = None if found_inf is None else found_inf.to(self._step_device).reshape(()) == 0
        self._steps.add_(1 if taken is None else taken.float())
        if self._momentum_weights is not None:
            new = self._next_weights
            self._momentum_weights.copy_(new if taken is None else torch.where(taken, new, self._momentum_weights))

    def columns(self, state: Mapping[Any, State]) -> Iterator[tuple[Any, Tensor, bool]]:
        """For each parameter whose rows several processes share: their group, the covers of its other axes as int32,
        and whether this process has no rows."""
        for part in self._parts:
            if part.group is not None and part.local.dim() > 1 and part.param.numel():
                rows = part.local.shape[0]
                yield part.group, state[part.param]["cover"].view(torch.int32)[rows:], rows == 0


def _choices(group: Group) -> tuple[Any, ...]:
    """The options of a group that decide which state a call has."""
    return bool(group["momentum"]), group["momentum_on"], group["cover_warmup"]


def _is_large(entry: Any) -> bool:
    return isinstance(entry, Tensor) and entry.numel() > _SMALL


def _geometry(t: Tensor) -> tuple[Any, ...]:
    return t.data_ptr(), t.shape, t.stride()


class Plan:
    """The operator calls of an optimizer's step, for the parameters that have gradients."""

    def __init__(self, optimizer: Any, grads: Grads) -> None:
        """Gather the parameters that move. All checks of a step come before anything is made or changed."""
        self._groups = [
            (list(group["params"]), None if all(g is not None for g in gs) else [g is not None for g in gs])
            for group, gs in zip(optimizer.param_groups, grads, strict=True)
        ]
        found: list[tuple[int, torch.device, list[tuple[int, int, Part]]]] = []
        seen: set[int] = set()
        position = 0
        for index, (group, gs) in enumerate(zip(optimizer.param_groups, grads, strict=True)):
            options_of(group)
            rate_is_one_number("SM3", group["lr"])
            momentum_dtype(group)
            first = group.get("tensor_id", position)
            by_device: dict[torch.device, list[tuple[int, int, Part]]] = {}
            for place, (p, g) in enumerate(zip(group["params"], gs, strict=True)):
                if g is None or id(p) in seen:
                    continue
                seen.add(id(p))  # a parameter that comes twice moves once; torch warns of it
                name = name_of(group, place, position + place)
                check_step(name, p, g)
                part = part_of("SM3", name, p)
                by_device.setdefault(part.local.device, []).append((place, first + place, part))
            found += [(index, device, items) for device, items in by_device.items()]
            position += len(gs)

        state = optimizer.state
        calls: list[tuple[int, torch.device, bool, list[tuple[int, int, Part]]]] = []
        for index, device, items in found:
            states = [state.get(part.param, {}) for *_, part in items]
            flags = are_warming(optimizer.param_groups[index], states, device)
            for warming in dict.fromkeys(flags):
                calls.append((index, device, warming, [i for i, w in zip(items, flags, strict=True) if w == warming]))
        for part in (part for *_, items in found for *_, part in items):
            state.setdefault(part.param, {})
        state_indices = {id(p): n for n, p in enumerate(state)}
        self._owners = list(state)
        self._calls: list[tuple[int, Call]] = []
        for index, device, warming, items in calls:
            group = optimizer.param_groups[index]
            moved = [Item(place, i, part, state[part.param], state_indices[id(part.param)]) for place, i, part in items]
            self._calls.append((index, Call(group, moved, device, warming)))
        self._columns: dict[tuple[int, torch.device], tuple[Any, list[Tensor], list[Tensor]]] = {}
        for _, call in self._calls:
            for group, cover, has_no_rows in call.columns(state):
                _, covers, stale = self._columns.setdefault((id(group), call.device), (group, [], []))
                covers.append(cover)
                stale += [cover] if has_no_rows else []

    def fits(self, optimizer: Any, grads: Grads) -> bool:
        """Whether a plan gathered now would be the same."""
        groups = optimizer.param_groups
        if len(groups) != len(self._groups):
            return False
        for group, gs, (params, active) in zip(groups, grads, self._groups, strict=True):
            if len(gs) != len(params) or not all(map(operator.is_, group["params"], params)):
                return False
            if not all(map(operator.is_not, gs, repeat(None))) if active is None else _present(gs) != active:
                return False
        owners, states = list(optimizer.state), list(optimizer.state.values())
        if len(owners) != len(self._owners) or not all(map(operator.is_, owners, self._owners)):
            return False
        # the operator checks the shapes of the first call's gradients before it writes anything
        return all(call.has_shapes(call.pick(grads[i])) for i, call in self._calls[1:]) and all(
            call.fits(groups[i], call.pick(grads[i]), states) for i, call in self._calls
        )

    def run(self, optimizer: Any, grads: Grads) -> None:
        """One step. An error over a gradient, a number or the state comes before anything is written."""
        groups, states = optimizer.param_groups, list(optimizer.state.values())
        grad_scale, found_inf = (getattr(optimizer, name, None) for name in ("grad_scale", "found_inf"))
        found_inf = None if found_inf is None else number(found_inf)
        ready = [(c, c.arguments(groups[i], c.pick(grads[i]), states, grad_scale, found_inf)) for i, c in self._calls]
        for call, arguments in ready:
            if call.fresh and call.plain:
                OPERATOR.refuse(*arguments)
        for call, arguments in ready:
            call.run(arguments, found_inf)
        for group, covers, stale in self._columns.values():
            combine_column_covers(group, covers, stale)


def _present(grads: Sequence[Tensor | None]) -> list[bool]:
    return [g is not None for g in grads]
