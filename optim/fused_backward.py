"""An optimizer's step inside the backward pass: each parameter moves as soon as its gradient is complete.

Each parameter has its own optimizer. A hook runs it after the parameter's gradient is accumulated, and then frees the
gradient. The hook leaves a :class:`Used` gradient in ``.grad``: it has no memory and raises an error at any use. So an
error stops everything that needs gradients after the backward pass:

- a second backward pass (gradient accumulation),
- clipping by a global norm,
- gradient scaling.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim import Optimizer


class Used(Tensor):
    """Stands for a gradient that the backward pass has used: it has no memory, and any use raises an error."""

    _name: str

    @staticmethod
    def __new__(cls, like: Tensor, name: str) -> Used:
        self: Used = Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=like.device)
        self._name = name
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Used(gradient of {self._name})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        flat = torch.utils._pytree.tree_leaves((args, kwargs))
        name = next(t._name for t in flat if isinstance(t, Used))
        raise RuntimeError(
            f"fuse_into_backward: the gradient of {name} was used and freed during the backward pass, so it cannot be "
            f"accumulated, clipped, scaled or read ({func}). Call zero_grad() after every backward pass, run one "
            "backward pass a step, and turn off gradient clipping and scaling (no clip_grad_norm_, max_grad_norm=0, "
            "no GradScaler). Hugging Face's Trainer measures the norm of the gradients in any case: use "
            "leanops.integrations.transformers.FusedTrainer, which does not"
        )


class FusedBackward(Optimizer):
    """The optimizer of :func:`fuse_into_backward`: the backward pass takes its steps, and trainers may use it."""

    @_disable_dynamo  # Dynamo would lose the attributes that are set before super().__init__()
    def __init__(self, optimizer_class: type[Optimizer], model_or_params: Any, options: dict[str, Any]) -> None:
        self._class, self._options = optimizer_class, options
        self._own: dict[Tensor, Optimizer] = {}  # each parameter's own optimizer
        self._group: dict[Tensor, int] = {}  # the index of each parameter's group
        self._known: list[dict[str, Any]] = []  # the options that each group's optimizers have
        self._hooks: list[Any] = []
        groups = _groups_of(model_or_params)
        # this optimizer never steps: it checks the arguments and gives the options' defaults
        whole = optimizer_class([{**g} for g in groups], **options)
        try:
            super().__init__(whole.param_groups, whole.defaults)
        except BaseException:
            self.remove()  # the hooks of the groups that were added before the refused one
            raise

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters. The next backward pass moves them."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        first = sum(len(g["params"]) for g in self.param_groups[:-1])
        names = group.get("param_names") or [f"parameter {first + i}" for i in range(len(group["params"]))]
        try:
            for name, p in zip(names, group["params"], strict=True):
                if p.grad is not None:
                    raise ValueError(f"fuse_into_backward: {name} has a gradient already; call zero_grad() first")
                if _is_fused(p):
                    raise ValueError(f"fuse_into_backward: {name} moves in the backward pass already; call remove()")
            settings = _settings(group)
            # SM3 derives random bits from tensor_id: the position gives the bits of one optimizer over all parameters
            own = {
                p: self._class([{**settings, "params": [p], "tensor_id": first + i}], **self._options)
                for i, p in enumerate(group["params"])
            }
        except BaseException:
            self.param_groups.pop()
            raise
        self._own.update(own)
        self._group.update(dict.fromkeys(own, len(self.param_groups) - 1))
        self._known.append(settings)
        for name, p in zip(names, group["params"], strict=True):
            if p.requires_grad:
                # Python's collector cannot free a cycle through a post-accumulate hook, so that hook refers to the
                # optimizer weakly. It can free a cycle through a gradient hook: that one keeps the optimizer alive.
                self._hooks.append(p.register_hook(self._keep))
                self._hooks.append(p.register_post_accumulate_grad_hook(partial(_use, weakref.ref(self), name)))

    def _keep(self, grad: Tensor) -> None:
        """A hook that does nothing: it lets every parameter keep this optimizer alive."""

    def _move(self, p: Tensor) -> None:
        self._share_options(self._group[p])
        self._own[p].step()

    def _share_options(self, index: int) -> None:
        """Copy the options that a scheduler or a user has changed in a group. Values that an optimizer sets stay."""
        group, known = self.param_groups[index], self._known[index]
        now = _settings(group)
        changed = {k: v for k, v in now.items() if k not in known or v is not known[k]}
        if changed:
            for p in group["params"]:
                self._own[p].param_groups[0].update(changed)
            known.update(changed)

    # --- what trainers call -------------------------------------------------------------------------------------------

    @_disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Mark the end of a step. A gradient that the user has assigned to ``.grad`` moves its parameter now.

        Args:
            closure: runs first, as in torch.optim; its backward pass moves the parameters.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and not isinstance(p.grad, Used):
                    self._move(p)
                    p.grad = None
        return loss

    @_disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set every ``.grad`` to None, as the next backward pass needs. This frees no memory."""
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    @_disable_dynamo
    def remove(self) -> None:
        """Remove the hooks from the parameters. Backward passes leave gradients again; the state stays."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for p in self._own:
            if isinstance(p.grad, Used):
                p.grad = None

    def optimizer_of(self, p: Tensor) -> Optimizer:
        """The parameter's own optimizer, which holds its state."""
        return self._own[p]

    # --- state --------------------------------------------------------------------------------------------------------

    @property
    def state(self) -> Any:
        """The state of every parameter that has one: the entries of the parameters' own optimizers."""
        return {p: own.state[p] for p, own in self._own.items() if p in own.state}

    @state.setter
    def state(self, value: Any) -> None:
        """Ignored: torch.optim.Optimizer assigns an empty state, and the parameters' optimizers hold the real one."""

    def state_dict(self) -> dict[str, Any]:
        """The state of one optimizer of the class over all parameters. Either kind loads what the other has saved."""
        state: dict[int, Any] = {}
        groups: list[dict[str, Any]] = []
        for index, group in enumerate(self.param_groups):
            self._share_options(index)
            parts = [self._own[p].state_dict() for p in group["params"]]
            first = sum(len(g["params"]) for g in groups)
            state |= {first + i: part["state"][0] for i, part in enumerate(parts) if 0 in part["state"]}
            # options that the optimizer itself changes, such as a step count, are in its own group
            kept = {k: v for part in parts[:1] for k, v in part["param_groups"][0].items() if k in group}
            groups.append({**_settings(group), **kept, "params": list(range(first, first + len(parts)))})
            if "param_names" in group:
                groups[-1]["param_names"] = list(group["param_names"])
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of one optimizer of the class over these parameters. The saved options replace the current.

        Raises ValueError when the numbers of groups or parameters differ, and the errors of the class itself.
        """
        theirs = state_dict["param_groups"]
        sizes = [len(g["params"]) for g in self.param_groups]
        if [len(g["params"]) for g in theirs] != sizes:
            raise ValueError(
                f"fuse_into_backward: state_dict must have groups of {sizes} parameters, got "
                f"{[len(g['params']) for g in theirs]}"
            )
        fresh: dict[Tensor, Optimizer] = {}
        for mine, saved in zip(self.param_groups, theirs, strict=True):
            for p, key in zip(mine["params"], saved["params"], strict=True):
                fresh[p] = own = self._class([{**self._own[p].param_groups[0], "params": [p]}], **self._options)
                entry = {0: state_dict["state"][key]} if key in state_dict["state"] else {}
                options = {**_settings(deepcopy(saved)), "tensor_id": own.param_groups[0]["tensor_id"], "params": [0]}
                own.load_state_dict({"state": entry, "param_groups": [options]})
        self._own = fresh
        for i, (mine, saved) in enumerate(zip(self.param_groups, theirs, strict=True)):
            options = fresh[mine["params"][0]].param_groups[0] if sizes[i] else saved
            mine.update({k: v for k, v in _settings(options).items() if k in saved})
            self._known[i] = _settings(mine)
            for p in mine["params"]:  # all share one tensor lr: schedulers write into it
                fresh[p].param_groups[0].update({k: mine[k] for k in self.defaults if k in mine})

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("fuse_into_backward: hooks on parameters cannot be copied or pickled; use state_dict()")


@_disable_dynamo  # in a compiled training step the backward pass runs the hook as it is
def _use(fused: weakref.ref[FusedBackward], name: str, p: Tensor) -> None:
    optimizer = fused()
    assert optimizer is not None
    optimizer._move(p)
    p.grad = Used(p.detach(), name)


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in group.items() if k not in ("params", "param_names")}


def _is_fused(p: Tensor) -> bool:
    """Whether a hook of a :class:`FusedBackward` is on the parameter."""
    hooks = (getattr(p, "_post_accumulate_grad_hooks", None) or {}).values()
    return any(getattr(h, "func", None) is _use for h in hooks)


def _groups_of(model_or_params: Any) -> list[dict[str, Any]]:
    """Parameter groups. For a module they have the parameters' names."""
    if isinstance(model_or_params, nn.Module):
        if isinstance(model_or_params, nn.parallel.DistributedDataParallel):
            raise ValueError(
                "fuse_into_backward: DistributedDataParallel averages gradients after the hook has used them; use "
                "fully_shard or a single process"
            )
        model_or_params = model_or_params.named_parameters()
    if isinstance(model_or_params, Tensor) or not isinstance(model_or_params, Iterable):
        raise TypeError(
            "fuse_into_backward: model_or_params must be a module or an iterable of parameters, (name, parameter) "
            f"pairs or groups, got {type(model_or_params).__name__}"
        )
    items: list[Any] = list(model_or_params)
    if not items:
        raise ValueError("fuse_into_backward: model_or_params is an empty parameter list")
    if isinstance(items[0], dict):
        return [{**g, "params": [g["params"]] if isinstance(g["params"], Tensor) else list(g["params"])} for g in items]
    return [{"params": items}]


def fuse_into_backward(
    optimizer_class: type[Optimizer] | None = None, model_or_params: Any = None, **options: Any
) -> FusedBackward:
    r"""Update every parameter during the backward pass, as soon as its gradient is complete, and free the gradient.

    .. math::

        \text{peak} = \text{activations} + \max_p \text{grad}_p \quad\text{instead of}\quad
        \text{activations} + \sum_p \text{grad}_p

    The updates have the bits of an ``optimizer_class`` that steps after the backward pass. This holds for every
    optimizer that moves a parameter by that parameter's gradient and state alone: all of torch.optim except LBFGS, and
    :class:`leanops.optim.SM3`.

    ::

        opt = fuse_into_backward(torch.optim.AdamW, model, lr=1e-3)
        schedule = torch.optim.lr_scheduler.LinearLR(opt)
        for batch in data:
            loss_of(model, batch).backward()  # moves the parameters
            opt.step()
            schedule.step()
            opt.zero_grad()

    Args:
        optimizer_class: any torch optimizer. options: its keyword arguments.
        model_or_params: a module, or any parameters or groups that the class takes. A parameter that does not require
            grad does not move. If it requires grad later, ``step()`` moves it.

    Returns:
        An optimizer with ``param_groups`` for schedulers, ``state_dict`` and ``load_state_dict`` (interchangeable with
        those of the class), ``step``, ``zero_grad``, and ``remove``, which removes the hooks. It lives as long as the
        parameters that it moves.

    **Refused**, with an error at the time of use:

    - a second gradient of a parameter before ``zero_grad()``: gradient accumulation, and reentrant checkpointing of a
      parameter that two segments use;
    - everything that reads gradients after the backward pass, because they are freed: clipping by norm or value, and
      GradScaler's unscaling.

    The parameters whose gradients came first have moved by then, so a backward pass that fails leaves a step half done.
    Hugging Face's Trainer measures the norm of the gradients even where it does not clip:
    :class:`leanops.integrations.transformers.FusedTrainer` does not, and makes the optimizer.

    Raises:
        ValueError: a DistributedDataParallel module; no parameters; parameters that already have a gradient or already
            move in the backward pass; an optimizer whose ``step`` needs a closure.
        TypeError: ``optimizer_class`` is no class of optimizers; ``model_or_params`` is no module and no parameters.
    """
    if optimizer_class is None:  # as Trainer calls what it finds in optimizer_cls_and_kwargs
        raise TypeError(
            "fuse_into_backward: optimizer_class and model_or_params must be given, got neither. In Hugging Face's "
            "Trainer use leanops.integrations.transformers.FusedTrainer with optimizer_cls_and_kwargs=(SM3, {...})"
        )
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, Optimizer)):
        raise TypeError(f"fuse_into_backward: optimizer_class must be a class of optimizers, got {optimizer_class!r}")
    closure = inspect.signature(optimizer_class.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"fuse_into_backward: optimizer_class must step without a closure, and {optimizer_class.__name__}.step "
            "needs a closure, which runs several backward passes a step"
        )
    return FusedBackward(optimizer_class, model_or_params, options)
