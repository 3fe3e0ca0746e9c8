"""GreenTrainer: train the most important tensors within a given share of full training's FLOPs."""

from __future__ import annotations

import copy
import math
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from leanops.optim.common import capabilities
from leanops.optim.selection.backward_flops import BackwardFlops, count, gradients, measure, undisturbed
from leanops.optim.selection.freezing import Freezer
from leanops.optim.selection.prefix_knapsack import prefix_knapsack

Loss = Callable[[], Any]


@dataclass(frozen=True)
class TensorSelection:
    """The selected tensors and their cost, in FLOPs of one step on the measured batch.

    - ``budget``: the most that the backward pass may cost.
    - ``cost``: the knapsack's cost of the selection, at most the budget.
    - ``backward``: the cost of the selection's backward pass, at most the budget. It is mostly less than ``cost``,
      because the knapsack charges all gradients of activations down to the deepest tensor. It is counted with this
      selection if ``select`` had a closure whose forward pass has the measured FLOPs, and otherwise computed by
      :class:`BackwardFlops`.
    - ``rho``: the share of full training's FLOPs, both passes.
    - ``exact``: whether the selection is proven to be the best; see :func:`prefix_knapsack`.
    """

    names: tuple[str, ...]
    importance: float
    forward: int
    backward: int
    full_backward: int
    budget: int
    cost: int
    exact: bool

    @property
    def rho(self) -> float:
        return (self.forward + self.backward) / (self.forward + self.full_backward)

    def __str__(self) -> str:
        return (
            f"{len(self.names)} tensors, {self.backward:,} of {self.full_backward:,} backward FLOPs "
            f"(budget {self.budget:,}), {self.rho:.1%} of full training"
        )


class TensorSelector:
    r"""Select the tensors to train: the largest total importance within a budget of FLOPs, solved exactly.

    .. math::

        \max_m \sum_k m_k I_k \quad \text{subject to} \quad \sum_k m_k\, dw_k + \sum_{j \le \text{deepest}} dy_j
        \le \rho_{bp} T_{bp}, \qquad \rho_{bp} = \rho \Big(1 + \frac{T_{fp}}{T_{bp}}\Big) - \frac{T_{fp}}{T_{bp}}

    so that a step, with its forward pass, costs at most the share ρ of a step that trains everything.

    **FLOPs are measured** by ``torch.utils.flop_counter`` on the autograd graph of a batch. ``dw_k`` is the cost of the
    gradient of tensor k. ``dy_k`` is the cost of the activations' gradients that k needs and no tensor above it needs;
    see :class:`BackwardFlops`. Work that the counter does not count (elementwise work, fused attention on a CPU) is
    free. Measure without activation checkpointing, and without hooks that make activations require grad, such as
    transformers' ``enable_input_require_grads()``. Before a selection is applied, its backward pass is counted. A
    selection that costs more than the budget is refused.

    **Importance** is a first-order estimate: how far the next step of this optimizer, with its state, learning rate
    and weight decay, lowers the loss through this tensor alone.

    .. math:: I_k = - \sum_i g_{k,i}\, \Delta w_{k,i}

    It takes one backward pass with all tensors, and a trial step on a copy of one tensor at a time. Afterwards weights,
    gradients, buffers, optimizer state and random generators are restored.

    ::

        selector = TensorSelector(model, opt, rho=0.5)
        for i, batch in enumerate(data):
            if i % 500 == 0:
                print(selector.select(lambda: loss_of(model, batch)))
            loss_of(model, batch).backward()
            opt.step()
            opt.zero_grad()

    Frozen tensors have no gradients, no gradient computation and no optimizer state.

    Args:
        model, optimizer: see :class:`LISA`; tensors are the parameters that require grad now.
        rho: ρ in (0, 1]. A forward pass is about a third of full training, so no smaller ρ leaves room for a tensor.

    Several processes: average :meth:`importance` over them, then give the average to :meth:`select` on each. The
    selection follows from the numbers alone.

    Raises:
        TypeError, ValueError: see :class:`LISA`; rho out of range; an optimizer that steps during the backward pass or
            has no backward pass (MeZO); a model sharded by FSDP, whose graph does not lead to its parameters.

    Source: GreenTrainer (2309.13192). The published dynamic program is not exact, its FLOPs come from formulas for each
    model, and its importance is the gradient after the trial step times that step.
    """

    def __init__(self, model: Any, optimizer: Any, *, rho: float = 0.5) -> None:
        if isinstance(rho, bool) or not isinstance(rho, int | float) or not 0 < rho <= 1:
            raise ValueError(f"TensorSelector: rho must be in (0, 1], got {rho!r}")
        self._freezer = Freezer("TensorSelector", model, optimizer)
        if capabilities.moves_in_backward(self._freezer.optimizer):
            raise ValueError(
                "TensorSelector: optimizer must not step inside the backward pass, as fuse_into_backward's does, "
                "because measuring runs backward passes that must not move weights"
            )
        if not capabilities.needs_gradients(self._freezer.optimizer):
            kind = type(self._freezer.optimizer).__name__
            raise ValueError(
                f"TensorSelector: optimizer must step by gradients, got {kind}, which has no backward pass"
            )
        if any(map(_is_fsdp, model.modules())):
            raise ValueError("TensorSelector: model must not be sharded by FSDP, whose graph does not reach parameters")
        self.rho = float(rho)
        self.flops: BackwardFlops | None = None
        self.selection: TensorSelection | None = None

    @property
    def trainable(self) -> list[str]:
        """Names of the tensors that train now."""
        return self._freezer.trainable

    # --- measuring ----------------------------------------------------------------------------------------------------

    def profile(self, closure: Loss) -> BackwardFlops:
        """Measure the FLOPs of each tensor on ``closure() -> loss``. The first :meth:`select` calls it.

        It does about three times the work of a step. Repeat it when the batch's shape changes much.
        """
        params = self._freezer.params
        with undisturbed(self._freezer.model, params, params):
            self.flops = measure("TensorSelector.profile", closure, params)
        return self.flops

    def importance(self, closure: Loss) -> dict[str, float]:
        """The importance I of every tensor on the batch of ``closure() -> loss``; 0 for tensors without a gradient."""
        params = self._freezer.params
        groups = {id(p): group for group in self._freezer.optimizer.param_groups for p in group["params"]}
        found: dict[str, Tensor] = {}

        def see(name: str, p: Tensor) -> None:
            assert p.grad is not None
            found[name] = -(p.grad * self._trial(p, p.grad, groups[id(p)])).sum().double()

        with undisturbed(self._freezer.model, params, params):
            gradients("TensorSelector.importance", closure, params, see)
        return {name: float(found[name]) if name in found else 0.0 for name in params}

    def measure(self, closure: Loss) -> tuple[int, int]:
        """Count the FLOPs of the forward and the backward pass of ``closure()`` with the tensors that train now."""
        return self._count("TensorSelector.measure", closure, self.trainable)

    def _count(self, op: str, closure: Loss, trainable: Collection[str]) -> tuple[int, int]:
        params = self._freezer.params
        with undisturbed(self._freezer.model, params, trainable):
            return count(op, closure, params)

    @torch.no_grad()
    def _trial(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> Tensor:
        """The change that the optimizer's next step would make to a parameter, computed on copies."""
        optimizer = self._freezer.optimizer
        moved = torch.nn.Parameter(p.detach().clone())
        moved.grad = grad
        state = optimizer.state[p] if p in optimizer.state else self._freezer.fresh(p)
        trial = object.__new__(type(optimizer))
        # a scheduler wraps step as an attribute of the optimizer: leave that out
        trial.__dict__.update({k: v for k, v in optimizer.__dict__.items() if k != "step"})
        trial._optimizer_step_pre_hooks = OrderedDict()
        trial._optimizer_step_post_hooks = OrderedDict()
        trial.state = defaultdict(dict, {moved: copy.deepcopy(state)})
        trial.param_groups = [{**group, "params": [moved]}]
        trial.step()
        return moved.detach() - p.detach()

    # --- selecting ----------------------------------------------------------------------------------------------------

    def select(self, closure: Loss | None = None, *, importance: Mapping[str, float] | None = None) -> TensorSelection:
        """Train the best tensors within the budget, freeze the others and free their state. Call it between steps.

        Args:
            closure: returns the loss of a batch and does not call backward. It may be left out if ``importance`` is
                given and FLOPs are measured; the selection's cost is then not counted.
            importance: the importance of every tensor, which is otherwise measured.

        Raises:
            ValueError: no closure where one is needed, or one that calls backward; importance that is not finite, or
                not given for all tensors; a rho that leaves room for no tensor; no importance above 0; a selection
                whose counted backward pass costs more than the budget. Nothing is changed then.
        """
        op = "TensorSelector.select"
        if closure is None and (self.flops is None or importance is None):
            raise ValueError(f"{op}: closure must be given to measure FLOPs or importance, got None")
        flops, known = self.flops, self.flops is not None
        if flops is None:
            assert closure is not None
            flops = self.profile(closure)
        if importance is None:
            assert closure is not None
            importance = self.importance(closure)
        selection = self._best(op, flops, importance)
        if closure is not None:
            forward, backward = self._count(op, closure, selection.names)
            if known and forward <= flops.forward and backward > selection.budget:
                # the profile is of another batch, whose FLOPs may differ (experts)
                flops = self.profile(closure)
                selection = self._best(op, flops, importance)
                forward, backward = self._count(op, closure, selection.names)
            if forward <= flops.forward and backward > selection.budget:
                raise ValueError(
                    f"{op}: closure must have a backward pass of at most {selection.budget:,} FLOPs with the selected "
                    f"tensors, got {backward:,}; measure without activation checkpointing and without hooks that make "
                    "activations require grad (enable_input_require_grads)"
                )
            if forward == flops.forward:
                selection = replace(selection, backward=backward)
        self.selection = selection
        self._freezer.apply(selection.names)
        self._freezer.free()
        return selection

    def _best(self, op: str, flops: BackwardFlops, importance: Mapping[str, float]) -> TensorSelection:
        if set(importance) != set(self._freezer.params):
            odd = sorted(set(importance) ^ set(self._freezer.params))
            raise ValueError(f"{op}: importance must have one entry for each tensor, got missing or unknown {odd}")
        values = [float(importance[name]) for name in flops.names]
        bad = [(n, v) for n, v in zip(flops.names, values, strict=True) if not math.isfinite(v)]
        if bad:
            raise ValueError(f"{op}: importance must be finite, got {bad[0][1]} for {bad[0][0]}")
        total = flops.forward + flops.backward
        if not total:
            raise ValueError(f"{op}: closure must do work that torch's FLOP counter counts, got a loss with 0 FLOPs")
        budget = math.floor(self.rho * total) - flops.forward
        chosen = prefix_knapsack(values, flops.dw, flops.dy, budget - flops.fixed)
        if not chosen.selected:
            if not any(v > 0 for v in values):
                raise ValueError(
                    f"{op}: importance must be above 0 for a tensor, got at most {max(values, default=0.0)}"
                )
            least = min(flops.cost([n]) for n, v in zip(flops.names, values, strict=True) if v > 0)
            raise ValueError(
                f"{op}: rho must be at least {(flops.forward + least) / total:.4f} for any tensor to fit "
                f"(the forward pass is {flops.forward / total:.4f}), got {self.rho}"
            )
        names = tuple(flops.names[k] for k in chosen.selected)
        return TensorSelection(
            names=names,
            importance=chosen.importance,
            forward=flops.forward,
            backward=flops.cost(names),
            full_backward=flops.backward,
            budget=budget,
            cost=chosen.cost + flops.fixed,
            exact=chosen.exact,
        )

    def release(self) -> None:
        """Let all tensors train again."""
        self._freezer.apply(self._freezer.params)

    # --- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The selection and the measured FLOPs, as plain numbers and strings."""
        return {
            "rho": self.rho,
            "tensors": list(self._freezer.params),
            "flops": None if self.flops is None else self.flops.state_dict(),
            "selection": None if self.selection is None else asdict(self.selection),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume: the saved selection trains, and the state of frozen tensors is freed. Call it before or after the
        optimizer's ``load_state_dict``.

        Raises ValueError, and changes nothing, if the saved run has other tensors or another rho.
        """
        op = "TensorSelector.load_state_dict"
        for name, mine in (("rho", self.rho), ("tensors", list(self._freezer.params))):
            if name not in state_dict:
                raise ValueError(f"{op}: state_dict must be one of TensorSelector, got one without {name!r}")
            if state_dict[name] != mine:
                raise ValueError(f"{op}: {name} must be the saved run's, {state_dict[name]!r}, got {mine!r}")
        try:
            flops, selection = state_dict["flops"], state_dict["selection"]
            flops = None if flops is None else BackwardFlops.from_state_dict(flops)
            selection = None if selection is None else TensorSelection(**{**selection, "names": (*selection["names"],)})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{op}: state_dict must be one of TensorSelector, got {error!r} in reading it") from error
        for name, found in (("flops", flops), ("selection", selection)):
            if found is not None and not self._freezer.params.keys() >= set(found.names):
                odd = sorted(set(found.names).difference(self._freezer.params))
                raise ValueError(f"{op}: {name} must name the model's tensors, got {odd}")
        self.flops, self.selection = flops, selection
        self._freezer.apply(self._freezer.params if selection is None else selection.names)
        self._freezer.free()


def _is_fsdp(module: nn.Module) -> bool:
    """Whether FSDP, of either version, shards the module. If torch's FSDP is not imported, no such module exists."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule | fsdp.FullyShardedDataParallel)
