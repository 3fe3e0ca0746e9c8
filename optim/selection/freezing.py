"""Which parameters train for a while: freezing that frees, and draws that follow from a seed and the round's number.

A frozen parameter does not require grad, so autograd computes no gradient for it; its ``grad`` is None; and the
optimizer's entry for it is dropped, moments and step count alike. It stays in its parameter group, where every torch
optimizer skips a parameter without a gradient (weight decay and momentum do not move it either). When it trains again
the optimizer starts it anew, as at its first step.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from leanops.common import seeds, streams
from leanops.optim.common import capabilities
from leanops.optim.common.capabilities import holder


def at_least(op: str, name: str, value: object, low: int) -> int:
    """An integer that is not too small."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{op}: {name} must be an integer >= {low}, got {value!r}")
    return value


def smallest(base: int, round_: int, candidates: Iterable[int], n: int) -> list[int]:
    """n of the candidates, uniformly without replacement: smallest ``derive(base, round, i)`` first."""
    ranked = sorted(candidates, key=lambda i: (seeds.derive(base, round_, i, stream=streams.DRAW_SEEDS), i))
    return sorted(ranked[:n])


# --- the model ------------------------------------------------------------------------------------------------------


def plain(op: str, model: Any) -> nn.Module:
    """The module itself, out of the wrappers that put a prefix before its parameters' names."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model must be a torch.nn.Module, got {type(model).__name__}")
    while True:
        inner = getattr(model, "_orig_mod", None)  # torch.compile
        if inner is None and isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


Blocks = str | nn.Module | Sequence[nn.Module | str] | None


def find_blocks(op: str, model: nn.Module, blocks: Blocks) -> dict[str, nn.Module]:
    """Name and module of each block.

    None: the entries of the longest ``nn.ModuleList`` (lists within another list's modules, such as experts, do not
    count). A name: the children of that module. Another string: a regular expression that a block's name matches in
    full. A module: its children. A list: modules, or their names.
    """
    names = {id(m): n for n, m in model.named_modules()}
    modules = dict(model.named_modules())
    if blocks is None:
        found = _longest(op, model)
    elif isinstance(blocks, str):
        if blocks in modules:
            found = {n: m for n, m in modules.items() if n and n.rpartition(".")[0] == blocks}
        else:
            pattern = _pattern(op, "blocks", blocks)
            found = {n: m for n, m in modules.items() if n and pattern.fullmatch(n)}
    else:
        found = {}
        for item in blocks.children() if isinstance(blocks, nn.Module) else _items(op, "blocks", blocks):
            name = item if isinstance(item, str) else names.get(id(item))
            if name is None or name not in modules:
                what = repr(item) if isinstance(item, str) else f"a {type(item).__name__} that is not in the model"
                raise ValueError(f"{op}: blocks must be modules of the model or their names, got {what}")
            found[name] = modules[name]
    if not found:
        raise ValueError(f"{op}: blocks must name modules of the model, got {blocks!r}, which matches none")
    for name in found:
        outer = next((o for o in found if o != name and name.startswith(f"{o}.")), None)
        if outer is not None:
            raise ValueError(f"{op}: blocks must not lie within one another, got {outer} and {name}")
    return found


def _longest(op: str, model: nn.Module) -> dict[str, nn.Module]:
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    outer = {n: m for n, m in lists.items() if not any(n.startswith(f"{o}.") for o in lists if o != n)}
    if not outer:
        raise ValueError(f"{op}: blocks must be given for a model without a torch.nn.ModuleList, got None")
    most = max(len(m) for m in outer.values())
    longest = [n for n, m in outer.items() if len(m) == most]
    if len(longest) > 1:
        raise ValueError(f"{op}: blocks must be given, for {' and '.join(longest)} have {most} modules each, got None")
    return {f"{longest[0]}.{n}" if longest[0] else n: m for n, m in outer[longest[0]].named_children()}


def _pattern(op: str, name: str, text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise ValueError(f"{op}: {name} must be a name or a regular expression, got {text!r} ({error})") from error


def _items(op: str, name: str, given: object) -> Iterable[Any]:
    if not isinstance(given, Iterable):
        raise ValueError(f"{op}: {name} must be a regular expression, a module or a list, got {given!r}")
    return given


Named = str | nn.Module | Tensor | Sequence[nn.Module | Tensor | str]


def find_params(op: str, argument: str, model: nn.Module, names: Collection[str], which: Named) -> set[str]:
    """Parameters by a regular expression that is found in their names, or as modules, parameters and such names."""
    if isinstance(which, str):
        pattern = _pattern(op, argument, which)
        found = {n for n in names if pattern.search(n)}
        if not found:
            raise ValueError(f"{op}: {argument} must match a trainable parameter's name, got {which!r}")
        return found
    by_id = {id(p): n for n, p in model.named_parameters() if n in names}
    found = set()
    for item in [which] if isinstance(which, nn.Module | Tensor) else _items(op, argument, which):
        if isinstance(item, str):
            found |= find_params(op, argument, model, names, item)
            continue
        inside = {
            by_id[id(p)] for p in (item.parameters() if isinstance(item, nn.Module) else [item]) if id(p) in by_id
        }
        if not inside:
            raise ValueError(
                f"{op}: {argument} must hold modules or trainable parameters of the model, got a {type(item).__name__}"
            )
        found |= inside
    return found


# --- freezing -------------------------------------------------------------------------------------------------------


_frozen = WeakIdKeyDictionary()  # parameters that a Freezer has frozen, and its name


class Freezer:
    """The parameters that take part, by name: those that require grad when it is made. Others are left alone."""

    def __init__(self, op: str, model: Any, optimizer: Any) -> None:
        self.op = op
        self.model = plain(op, model)
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
        if not isinstance(inner, Optimizer):
            raise TypeError(f"{op}: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if isinstance(inner, torch.optim.LBFGS):
            raise ValueError(
                f"{op}: optimizer must keep its state by parameter, got LBFGS, whose history spans them all"
            )
        if capabilities.state_is_replayed(inner):
            kind = type(inner).__name__
            raise ValueError(f"{op}: optimizer must not be {kind} with momentum_mode='store': its log would not replay")
        self.optimizer = inner
        for name, p in self.model.named_parameters():
            if not p.requires_grad and p in _frozen:
                raise ValueError(
                    f"{op}: model must be released first, got {name} as {_frozen[p]} froze it; call its release(), or "
                    "let all that is to take part require grad"
                )
        self.params: dict[str, Tensor] = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        if not self.params:
            raise ValueError(f"{op}: model must have parameters that require grad, got none")
        held = {id(p) for group in inner.param_groups for p in group["params"]}
        absent = [n for n, p in self.params.items() if id(p) not in held]
        if absent:
            raise ValueError(
                f"{op}: optimizer must hold every parameter of the model that requires grad, got one without "
                f"{absent[0]} ({len(absent)} of {len(self.params)} are absent)"
            )
        self._eager = bool(self.fresh(nn.Parameter(torch.zeros(1, device="cpu"))))

    def fresh(self, p: Tensor) -> dict[str, Any]:
        """What the optimizer makes of a parameter when it is built: mostly nothing (Adagrad does not wait)."""
        try:
            kind = holder(self.optimizer, next(iter(self.params.values())))
            made = type(kind)([p], **kind.defaults)
        except Exception:  # a class whose arguments are not its defaults, as torch's are: taken to wait
            return {}
        return dict(made.state.get(p, {}))

    @property
    def trainable(self) -> list[str]:
        return [n for n, p in self.params.items() if p.requires_grad]

    def apply(self, trainable: Collection[str]) -> None:
        """Let these train and freeze the others. The optimizer's state is not touched yet; see :meth:`free`."""
        for name, p in self.params.items():
            train = name in trainable
            if p.requires_grad != train:
                p.requires_grad_(train)
            if train:
                _frozen.pop(p, None)
            else:
                _frozen[p] = self.op
                p.grad = None
            if train and self._eager and p not in (state := holder(self.optimizer, p).state):
                state[p] = self.fresh(p)

    def free(self) -> None:
        """Drop the optimizer's state of all that is frozen."""
        counting: Optimizer | None = None
        for p in self.params.values():
            if not p.requires_grad:
                optimizer = holder(self.optimizer, p)
                capabilities.free_state(optimizer, p)
                if any("step" in group for group in optimizer.param_groups):
                    counting = optimizer
        if counting is not None:
            warnings.warn(
                f"{self.op}: {type(counting).__name__} counts steps by parameter group, so what trains again starts "
                "with moments of 0 beside an old count, and its first updates are of another size",
                stacklevel=4,
            )


class Rounds:
    """Draws anew at the start of every round of ``period`` steps; the base of LISA and HalfFineTuning.

    What trains in a round follows from the seed and the round's number alone, so a run that is resumed, or moved with
    :meth:`seek`, continues as if it had never stopped.
    """

    _SETTINGS: tuple[str, ...] = ()  # what a resumed run must have in common with the saved one

    def __init__(self, model: Any, optimizer: Any, period: int | None, seed: int) -> None:
        self._op = type(self).__name__
        self.period = None if period is None else at_least(self._op, "period", period, 1)
        self.seed = seeds.check(self._op, seed)
        self._freezer = Freezer(self._op, model, optimizer)
        self._steps, self._round = 0, 0
        self._stale = True  # the optimizer may hold state of frozen parameters
        self._released = False
        self._hook: Any = None

    def _draw(self, round_: int) -> set[str]:
        """Names of what trains in a round."""
        raise NotImplementedError

    @property
    def steps(self) -> int:
        """Optimizer steps so far."""
        return self._steps

    @property
    def round(self) -> int:
        """The number of the current round."""
        return self._round

    @property
    def trainable(self) -> list[str]:
        """Names of the parameters that train now."""
        return self._freezer.trainable

    def step(self) -> None:
        """Count a step; call it after ``optimizer.step()``. At the end of a round, draw anew and free.

        Raises RuntimeError after :meth:`attach`, for every step would then count twice.
        """
        if self._attached:
            raise RuntimeError(f"{self._op}.step: attach() counts the steps already; call one of them")
        self._advance()

    @property
    def _attached(self) -> bool:
        """Whether a hook counts: the user may have removed it by its handle."""
        return self._hook is not None and self._hook.id in (self._hook.hooks_dict_ref() or ())

    def _advance(self) -> None:
        if self._released:
            return
        self._steps += 1
        if self.period is not None:
            self._enter(self._steps // self.period)
        if self._stale:
            self._freezer.free()
            self._stale = False

    def _enter(self, round_: int) -> None:
        if round_ != self._round or self._released:
            self._round = round_
            self._apply()

    def _apply(self) -> None:
        self._freezer.apply(self._draw(self._round))
        self._stale, self._released = True, False

    def seek(self, steps: int) -> None:
        """Go to where ``steps`` steps lead. State of what is frozen there is freed at the next step."""
        at_least(f"{self._op}.seek", "steps", steps, 0)
        self._steps = steps
        self._enter(self._round if self.period is None else steps // self.period)

    def attach(self) -> Any:
        """Count the optimizer's steps by a hook instead of calls of :meth:`step`; returns the hook's handle."""
        if not self._attached:
            hook: Callable[..., None] = lambda *_: self._advance()  # noqa: E731
            self._hook = self._freezer.optimizer.register_step_post_hook(hook)
        return self._hook

    def release(self) -> None:
        """Let all parameters train again, and count no more steps; :meth:`seek` and :meth:`load_state_dict` resume."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if not self._released:
            self._freezer.apply(self._freezer.params)
            self._released = True

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_hook": self._attached}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _hook=None)
        if state["_hook"]:  # a copy's optimizer has no hooks
            self.attach()

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("period", "seed", *self._SETTINGS)}

    def state_dict(self) -> dict[str, Any]:
        """Position and settings, plain numbers and strings. The optimizer's own state_dict holds the state."""
        return {"steps": self._steps, "round": self._round, **self._settings()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume: the round's parameters train. It may come before or after the optimizer's ``load_state_dict``.

        Raises ValueError, and changes nothing, where the saved run has other settings.
        """
        op = f"{self._op}.load_state_dict"
        for name, mine in self._settings().items():
            if name not in state_dict:
                raise ValueError(f"{op}: state_dict must be one of {self._op}, got one without {name!r}")
            if state_dict[name] != mine:
                raise ValueError(f"{op}: {name} must be the saved run's, {state_dict[name]!r}, got {mine!r}")
        steps, round_ = (at_least(op, name, state_dict.get(name), 0) for name in ("steps", "round"))
        self._steps, self._round = steps, round_
        self._apply()
