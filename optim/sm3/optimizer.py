"""SM3 as a torch optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from leanops.common import seeds
from leanops.common.checks import rate_is_one_number
from leanops.optim.sm3.calls import Plan
from leanops.optim.sm3.compiled import enlist, traced_step
from leanops.optim.sm3.options import Group, cover_warmup, momentum_dtype, name_of, options_of
from leanops.optim.sm3.refusals import check_parameter
from leanops.optim.sm3.state import Kept, loaded, loaded_group, saved, saved_group


def _check_group(group: Group) -> None:
    """ValueError for an option that no step could use."""
    options_of(group)
    lr = group["lr"]
    rate_is_one_number("SM3", lr)
    if not 0 <= lr < float("inf"):
        raise ValueError(f"SM3: lr must be a finite number >= 0, got {lr}")
    momentum_dtype(group)
    cover_warmup(group)
    seeds.check("SM3", group["seed"])
    if group["differentiable"]:
        raise ValueError("SM3: differentiable=True is not supported: the step is one operator that writes in place")
    if group["foreach"] and group["fused"]:
        raise RuntimeError("SM3: `fused` and `foreach` cannot be `True` together")


# options that a state of an earlier version lacks, with what that version did; the defaults may change
_EARLIER = {"cover_warmup": 0, "momentum_on": "update"}

# torch's own: CUDA graphs need capturable=True (the name is that of torch 2.12 and later, or that of 2.10)
_graph_capture_check: Callable[[Optimizer], None] = getattr(
    Optimizer, "_accelerator_graph_capture_health_check", None
) or getattr(Optimizer, "_cuda_graph_capture_health_check")  # noqa: B009


class SM3(Optimizer):
    r"""SM3-II: an adaptive optimizer whose second moments are one vector for each axis of a weight.

    .. math::

        \nu &= \begin{cases} \min_k \mu_k[i_k] + g^2 & \beta = 1 \\
                             \beta \min_k \mu_k[i_k] + (1 - \beta)\, g^2 & \beta < 1 \end{cases} \qquad
        \mu_k[j] \leftarrow \max_{i_k = j} \nu_i \qquad
        u = \frac{g}{\sqrt{\nu + \epsilon}} \;(0 \text{ where } \nu = 0) \\
        m &\leftarrow \beta_m m + (1 - \beta_m)\, u, \qquad w \leftarrow (1 - \eta \lambda)\, w - \eta\, m

    without bias correction. One fused pass over the weights, one operator call a parameter group and device
    (:func:`leanops.sm3_step_`). For ``n_0 x n_1`` weights the state is ``n_0 + n_1`` numbers and the momentum: 4 bytes
    a parameter in fp32, 2 in bf16, about 1.02 in int8 (of long rows, see ``momentum_dtype``), and none at all with
    ``momentum=0`` (.003 bytes a parameter for the weights of a 1B model).

    Args:
        params: parameters, (name, parameter) pairs or groups with options of their own, as in torch.optim: float32,
            bfloat16, float16 or float64, of any shape and strides. A parameter without a gradient does not move.
        lr: η, a number or a one-element tensor (on the CPU or the device), assigned by any scheduler.
        momentum: β_m in [0, 1).
        beta: β in (0, 1]; 1 sums the squares as Adagrad does, less than 1 averages them.
        eps: ε >= 0, added to ν in fp32 whatever the gradient's dtype.
        weight_decay: λ >= 0.
        decoupled: decay the weights, as above; False: add λ w to the gradient.
        momentum_dtype: None or torch.float32: fp32 for every dtype of weights; torch.bfloat16; torch.int8: codes in
            blocks of 256 with one fp32 scale each. A block lies within a row of axis 0: with ``C`` elements a row,
            ``1 + 4 ceil(C / 256) / C`` bytes a parameter (1.06 at 64, 1.5 at 8). Vectors, scalars and matrices of one
            column keep fp32, so that no block depends on how a parameter is sharded.
        stochastic_rounding: round bf16 and fp16 weights stochastically. In bf16, nearest rounding loses every update
            that is below 1/256 of its weight. Stochastic rounding keeps the mean, also at the end of the range, where
            the next number is an infinity.
        seed: the rounding bits follow from it, the parameter's position and the number of steps taken: a resumed run
            repeats them.
        cover_warmup: the first ``cover_warmup`` steps of each parameter fill its covers, move no weight and make no
            momentum. Without them, the first update with ``beta`` 1 is ±1 for every weight, and momentum repeats it for
            ``1 / (1 - β_m)`` steps. A parameter whose state is made anew (by LISA, or because it was deleted) warms up
            anew. While a warm-up lasts, steps with ``capturable`` or ``fused`` wait for the device, and no CUDA graph
            can be captured.
        momentum_on: what the momentum averages. "update": u, as above and as published. "gradient_unpublished": g,
            before the division and with a bias correction: ``m <- β_m m + (1 - β_m) g``, ``u = (m / (1 - β_m^t)) /
            sqrt(ν + ε)`` and ``w <- (1 - ηλ) w - η u``, where t counts the gradients in m. It is in no paper.
        maximize: step along the gradient instead of against it; ``.grad`` stays as it is.
        capturable: keep ``step`` on the parameters' device, so that nothing in a step waits for it (CUDA graphs).
        foreach, fused: accepted as by torch's optimizers, but a step always takes all tensors of a group in one call.
            ``fused`` keeps ``step`` on the device and unscales gradients under GradScaler, as in torch. Both at once
            are refused, as in torch.
        differentiable: refused.

    **State** of a parameter, made at its first step: ``step`` (float32, on the CPU unless capturable or fused),
    ``cover`` (fp32, the μ_k one after another; :func:`leanops.sm3_cover_axes` takes them apart), ``momentum_buffer``
    and, for int8, ``momentum_scale``; with ``momentum_on="gradient_unpublished"`` also ``momentum_weight``, 1 - β_m^t.
    An entry may be replaced, moved or deleted between steps. A deleted entry starts anew, and the memory of a large one
    is free at once. In ``state_dict()`` ``cover`` is a dict with an entry for each axis, ``{"0": μ_0, "1": μ_1, ...}``.
    ``load_state_dict`` restores every dtype bit by bit.

    **GradScaler** works as with torch's AdamW: it unscales the gradients before the step, so that they can be clipped,
    and leaves out a step whose gradients hold an infinity. With ``fused=True`` the step itself unscales them, takes
    float16 gradients too, and waits for no device; a trainer then cannot clip them.

    **torch.compile(optimizer.step)** has no graph breaks and does not compile anew when rate or momentum change. With
    ``fullgraph=True``, compile before you make a scheduler: it wraps ``step`` in a function that torch does not trace.

    **FSDP2, DTensor.** Parameters sharded by rows (``Shard(0)`` on one axis of the mesh) or replicated. The covers of
    the rows stay local. Those of the other axes, of all parameters together, take one all-reduce (maximum) a step. The
    result equals that of one process bit for bit, given the same gradients. ``state_dict`` has DTensors of whole
    tensors that do not depend on the mesh, as ``torch.distributed.checkpoint`` expects. A state that one process saved
    loads into a sharded optimizer, and the other way round.

    Raises:
        ValueError: an option out of its range; parameters that are complex, not dense, or sharded in another way; a
            gradient of another dtype or shape; a saved state that does not fit.
        RuntimeError: sparse gradients; a parameter on the meta device; state that was made in inference mode, outside
            of inference mode.
        TypeError: an lr that is no number.
        No weight and no value of the state changes when an error is raised.

    Sources: Anil et al., "Memory-Efficient Adaptive Optimization" (1901.11150), SM3-II; averages (β < 1) as in the
    README of google-research/sm3, whose code only sums.
    """

    @_disable_dynamo  # Dynamo would lose the attributes that are set before super().__init__()
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.1,
        momentum: float = 0.9,
        beta: float = 1.0,
        eps: float = 1e-30,
        weight_decay: float = 0.0,
        *,
        decoupled: bool = True,
        momentum_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        maximize: bool = False,
        capturable: bool = False,
        seed: int = 0,
        cover_warmup: int = 0,
        momentum_on: str = "update",
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "beta": beta,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled": decoupled,
            "momentum_dtype": momentum_dtype,
            "stochastic_rounding": stochastic_rounding,
            "maximize": maximize,
            "capturable": capturable,
            "seed": seed,
            "cover_warmup": cover_warmup,
            "momentum_on": momentum_on,
            "foreach": foreach,
            "fused": fused,
            "differentiable": differentiable,
        }
        _check_group(defaults)
        self._begin()
        super().__init__(params, defaults)

    def _begin(self) -> None:
        """Make the attributes that are neither saved nor copied."""
        self._plan: Plan | None = None
        if "_key" not in self.__dict__:
            self._key = enlist(self)
            self._number = torch.zeros(1, device="cpu")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with options of their own. Nothing is added when an error is raised."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        before = sum(len(g["params"]) for g in self.param_groups[:-1])
        try:
            _check_group(group)
            for place, p in enumerate(group["params"]):
                check_parameter(name_of(group, place, before + place), p)
        except BaseException:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of every parameter that has a gradient. Returns the closure's result, or None without a closure.

        Args:
            closure: evaluates the model again and calls backward, as in torch.optim.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            traced_step(self, self._key, self._number)
            return loss
        _graph_capture_check(self)
        grads = [[p.grad for p in group["params"]] for group in self.param_groups]
        plan = self._plan
        if plan is None or not plan.fits(self, grads):
            self._plan = None
            plan = Plan(self, grads)
        plan.run(self, grads)
        self._plan = plan
        return loss

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether GradScaler leaves the gradients scaled and sets ``grad_scale`` and ``found_inf`` for a step. Trainers
        that clip gradients refuse this, so only ``fused=True`` asks for it, as in torch."""
        return bool(self.defaults.get("fused"))

    kept_by_reset = frozenset({"step"})  # it numbers the bits of stochastic rounding; no correction depends on it

    def free_state(self, p: Tensor) -> None:
        """Drop a parameter's state and free its memory at once. The parameter's next step makes a new state."""
        self.state.pop(p, None)
        self._plan = None  # it would hold the memory until the next step

    # --- state --------------------------------------------------------------------------------------------------------

    def _numbered(self) -> list[tuple[str, Tensor, Group]]:
        """Name, parameter and group, in the order in which a state_dict numbers parameters."""
        numbered: list[tuple[str, Tensor, Group]] = []
        for group in self.param_groups:
            numbered += [(name_of(group, i, len(numbered) + i), p, group) for i, p in enumerate(group["params"])]
        return numbered

    def state_dict(self) -> dict[str, Any]:
        """torch's state_dict, where each cover is a dict of its axes; see the class for DTensor parameters."""
        handle = self.register_state_dict_post_hook(_to_saved, prepend=True)  # before users' hooks
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load copies of a saved state, bit by bit. ValueError, and nothing changes, for a state that does not fit."""
        before = self.register_load_state_dict_pre_hook(_to_kept)  # after users' hooks
        after = self.register_load_state_dict_post_hook(_unpack, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    @_disable_dynamo
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name, parameter in inspect.signature(SM3.__init__).parameters.items():
            if parameter.default is not inspect.Parameter.empty:  # an option, which an older state may lack
                for options in (self.defaults, *self.param_groups):
                    options.setdefault(name, _EARLIER.get(name, parameter.default))
        self._begin()
        if any(group["cover_warmup"] for group in self.param_groups):  # compiled steps look at the counts anew
            self._key = enlist(self)


def _to_saved(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    assert isinstance(optimizer, SM3)
    state = dict(state_dict["state"])
    for i, (name, p, _) in enumerate(optimizer._numbered()):
        if isinstance(state.get(i), dict):
            state[i] = saved("SM3.state_dict", name, p, state[i])
    groups = [saved_group(group) for group in state_dict["param_groups"]]
    return {**state_dict, "state": state, "param_groups": groups}


def _to_kept(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
    assert isinstance(optimizer, SM3)
    saved_groups = state_dict["param_groups"]
    if [len(g["params"]) for g in saved_groups] != [len(g["params"]) for g in optimizer.param_groups]:
        return None  # torch raises an error
    state = dict(state_dict["state"])
    keys = [(key, group) for group in saved_groups for key in group["params"]]
    for (key, options), (name, p, _) in zip(keys, optimizer._numbered(), strict=True):
        if state.get(key):
            step_on_device = bool(options.get("capturable") or options.get("fused"))
            state[key] = Kept(loaded("SM3.load_state_dict", name, p, state[key], step_on_device))
    groups = [loaded_group(group) for group in saved_groups]
    for group in groups:
        _check_group({**optimizer.defaults, **group})
    return {**state_dict, "state": state, "param_groups": groups}


def _unpack(optimizer: Optimizer) -> None:
    state: Any = optimizer.state
    for key, value in state.items():
        if isinstance(value, Kept):
            state[key] = value.value
