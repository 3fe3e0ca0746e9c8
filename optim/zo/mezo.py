"""MeZO: fine-tuning with forward passes alone, in the memory of inference."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from leanops.common import seeds
from leanops.common.checks import finite, is_integer, one_of
from leanops.optim.zo.directions import Noise
from leanops.optim.zo.estimate import Evaluator
from leanops.optim.zo.log import ZoLog
from leanops.optim.zo.processes import Reduction
from leanops.optim.zo.run_parameters import RunParameters
from leanops.optim.zo.run_record import Record
from leanops.optim.zo.slots import Slot, fixed_kept
from leanops.optim.zo.step import FIELDS
from leanops.optim.zo.variants import VARIANTS, strategy_of
from leanops.zo import MAX_RANK, VERSION


class MeZO(Optimizer):
    r"""Zeroth-order SGD: two evaluations of any function a step, no backward pass, no gradient, no activations kept.

    .. math::

        g = \frac{L(\theta + \epsilon z) - L(\theta - \epsilon z)}{2 \epsilon}, \qquad
        \theta \leftarrow (1 - \eta \lambda)\, \theta - \eta\, g\, z

    with ``z`` regenerated from a seed (``zo/1``) wherever it is used, never stored. ``n`` directions: the mean of their
    updates, applied in one pass. Other estimates of g: ``one_sided``, (L(θ + εz) - L(θ)) / ε; ``sign``, sign of the
    difference; ``fzoo``, (L(θ + εz_i) - L(θ)) / σ with σ the (biased) standard deviation of the n losses L(θ + εz_i);
    ``hizoo``, spsa along z / sqrt(h), where the curvature h, one fp32 number an element, is learnt from a third
    evaluation, L(θ); see :mod:`leanops.optim.zo.hizoo`.
    On a quadratic function spsa gives g = zᵀ∇L exactly, whatever ε is.

    **The weights are exactly what they were** after the evaluations, in every dtype, also when the closure raises;
    only the update changes them.

    Args:
        params: parameters, (name, parameter) pairs or groups with their own lr, weight_decay and momentum, as in
            torch.optim. Those that do not require grad do not move. A parameter's id is its position.
        lr: η. Published: 1e-6 or 1e-7 for all weights, 1e-4 for LoRA, 1e-2 for prefixes.
        eps: ε. Published: 1e-3 for all weights, 1e-2 for LoRA, 1e-1 for prefixes.
        weight_decay: λ of a group; :func:`decay_groups` makes the usual two groups of a model.
        momentum: β in m ← β m + g z, θ ← θ - η m (no dampening).
        directions: n, the number of directions of a step.
        distribution: of z, ``"gaussian"``, ``"rademacher"`` (less variance, and far cheaper to make; FZOO's own) or
            ``"lowrank"``, which is LOZO: Z = U Vᵀ for a parameter of two or more dimensions (rows: ``size(0)``), plain
            Gaussian for the others. U is new in every direction of every step, V every ``period`` steps.
        rounding: of the update, ``"nearest"`` or ``"stochastic"``. In bf16 and fp16 nearest rounding swallows most of a
            small update (a cosine of 0.15 with what was intended at lr 1e-7); stochastic rounding is right on average.
        seed: the run's seed; the seed of each direction of each step follows from it.
        model: names the parameters in the log, and shows ``perturb="auto"`` how the weights are used; required with
            FSDP.
        variant: ``"spsa"``, ``"one_sided"``, ``"sign"``, ``"fzoo"`` or ``"hizoo"``. HiZOO needs Gaussian z; it keeps 4
            bytes a parameter (8 in fp64) and a second scalar a direction in the log; its momentum must be stored.
        momentum_mode: ``"recompute"`` keeps no tensor: each step makes m anew from scalars and seeds of the last steps
            (those with β^j >= 2^-24: 158 steps at 0.9, each costs as much noise as an update; m starts at 0 again
            where other parameters move than before). ``"store"`` keeps one fp32 tensor a parameter.
        perturb: ``"scratch"`` perturbs a weight where it is used, into scratch as large as the largest use; ``"copy"``
            perturbs all weights in place and restores them from a copy; ``"inplace"`` adds and subtracts: it is **not
            exact**, and meant for machines without memory for either; ``"auto"`` is copy where few elements move (2^23
            at most), for compiled, scripted and sharded models, and for closures that call a compiled function, and
            scratch for all others. The exact modes have the same bits.
        on_nonfinite: what a step does when a loss is NaN or infinite: ``"raise"`` raises FloatingPointError, ``"skip"``
            skips the step and logs it as skipped. Neither weights nor buffers change in either case.
        same_rng: every evaluation of a step sees the same state of the global generators of torch, NumPy and ``random``
            (the same dropout masks), and the state advances as if one evaluation had run. A generator that the closure
            owns is not found: seed it inside the closure.
        log_file: append the log to this file as the run goes on; see :class:`ZoLog`. Of the processes of a group, the
            first writes it.
        process_group: average g over these processes, which exchange the scalars of a step and nothing else. The
            default is the group of a ``model`` in DistributedDataParallel, or of the mesh of DTensor parameters.
        parallel: ``"data"``: every process evaluates the same perturbation on its own data; ``"direction"``: process j
            of W evaluates directions j, j + W, ... of n >= W; ``"none"``: every process is a run of its own. Where
            torch.distributed has several processes and no group is known, all but ``"none"`` are refused.
        rank: r of ``"lowrank"``, U [n, r] and V [m, r]. E Z Zᵀ is r times that of Gaussian z. Learning rates of LOZO's
            published code carry over. The formula of its paper has a factor 1/r: divide a rate for that formula by r.
        period: the number of steps that ``"lowrank"`` uses one V for.
        exclude: what neither moves nor is perturbed: names of parameters, regular expressions that are searched for in
            the names, or parameters; or a mapping from these to rows, such as ``{"embed.weight": [0]}`` for a padding
            row (None: the whole parameter). The log holds the rows.
        smoothing: α of ``"hizoo"``, the share of a step's curvature in h. Published: 1e-10 to 1e-6.

    ``step(closure)`` calls ``closure()`` under no_grad, two times a direction (n + 1 times in all for one_sided and
    fzoo, 2n + 1 times for hizoo), and returns the mean of the evaluations. The closure returns a scalar: a tensor of
    one element or a number. It need not be differentiable. It must not draw a new batch at each call. The first step
    evaluates once more, to see whether the closure computes the same twice. It evaluates once or twice more if some
    weight reaches no torch function (see :mod:`leanops.optim.zo.perturb_at_use`). Every evaluation of a step starts
    from the same buffers (running statistics) of ``model`` and of modules that the closure refers to. After the step
    the buffers are what the last evaluation made of them.

    Raises:
        ValueError: bad hyperparameters; parameters that are not dense floats, that overlap, or come twice.
        RuntimeError: no closure; a parameter whose dtype or shape has changed.
        FloatingPointError: see on_nonfinite.

    Sources: MeZO (2305.17333), FZOO, LOZO (2410.07698), HiZOO (2402.15173).
    """

    @_disable_dynamo  # Dynamo would lose the attributes that are set before super().__init__()
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-6,
        eps: float = 1e-3,
        *,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        directions: int = 1,
        distribution: str = "gaussian",
        rounding: str = "nearest",
        seed: int = 0,
        model: nn.Module | None = None,
        variant: str = "spsa",
        momentum_mode: str = "recompute",
        perturb: str = "auto",
        on_nonfinite: str = "raise",
        same_rng: bool = True,
        log_file: str | os.PathLike[str] | None = None,
        process_group: Any = None,
        parallel: str = "data",
        rank: int = 2,
        period: int = 50,
        smoothing: float = 1e-8,
        exclude: Any = None,
    ) -> None:
        if not is_integer(directions) or directions < 1:
            raise ValueError(f"MeZO: directions must be an integer >= 1, got {directions!r}")
        one_of("MeZO", "distribution", distribution, ("gaussian", "rademacher", "lowrank"))
        if not 0.0 < finite("MeZO", "smoothing", smoothing, 0.0) < 1.0:
            raise ValueError(f"MeZO: smoothing must be in (0, 1), got {smoothing}")
        if not isinstance(model, nn.Module | None):
            raise TypeError(f"MeZO: model must be a torch.nn.Module or None, got {type(model).__name__}")
        for name, value, most in (("rank", rank, MAX_RANK), ("period", period, 2**63)):
            if not is_integer(value) or not 1 <= value <= most:
                raise ValueError(f"MeZO: {name} must be an integer in [1, {most}], got {value!r}")
        noise = Noise(distribution, int(rank), int(period)) if distribution == "lowrank" else Noise(distribution)
        one_of("MeZO", "rounding", rounding, ("nearest", "stochastic"))
        one_of("MeZO", "variant", variant, list(VARIANTS))
        one_of("MeZO", "momentum_mode", momentum_mode, ("recompute", "store"))
        one_of("MeZO", "on_nonfinite", on_nonfinite, ("raise", "skip"))
        strategy = strategy_of(
            {
                "variant": variant,
                "directions": int(directions),
                **noise.settings,
                "rounding": rounding,
                "momentum_mode": momentum_mode,
                "smoothing": float(smoothing),
            }
        )
        strategy.check()
        settings = {
            "zo": VERSION,
            "seed": seeds.check("MeZO", seed),
            "seed_rule": seeds.RULE,
            **strategy.settings,
            "eps": finite("MeZO", "eps", eps, 0.0, above=True),
            **strategy.own_settings,
        }
        self._on_nonfinite = on_nonfinite
        self._evaluator = Evaluator(perturb, strategy, model, same_rng)
        self._reduction = Reduction(process_group, parallel, directions, model)
        self._log_file = log_file
        self._run_parameters = RunParameters(model, exclude)
        self._record = Record(settings)
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self._run_parameters.check_exclusions_used()
        self._reduction.check(self._flat())
        self._record.begin(self._flat(), len(self.param_groups))

    # --- capabilities, see leanops.optim.common.capabilities ----------------------------------------------------------

    needs_gradients = False
    replayable = True

    @property
    def state_is_replayed(self) -> bool:
        return self._record.strategy.has_state

    # --- parameters ---------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; their ids follow the present ones. Nothing is added when an error is raised."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_options(group)
            new = self._run_parameters.join(self._flat(), group, len(self.param_groups) - 1, self._record.entries)
        except BaseException:
            self.param_groups.pop()
            raise
        self._record.join(new)

    def _flat(self) -> list[Tensor]:
        """Every parameter; the position is the id."""
        return [p for group in self.param_groups for p in group["params"]]

    def _check_options(self, group: dict[str, Any]) -> None:
        for name in FIELDS:
            finite("MeZO", name, group[name], 0.0)
        if float(group["momentum"]) >= 1.0:
            raise ValueError(f"MeZO: momentum must be below 1, got {group['momentum']}")
        self._record.strategy.check_momentum(float(group["momentum"]))

    def _slots(self) -> list[list[Slot]]:
        """The slots of the parameters that move, by group."""
        return self._run_parameters.slots(self._flat(), self._record, len(self.param_groups), self.state)

    # --- a step -------------------------------------------------------------------------------------------------------

    @property
    def log(self) -> ZoLog:
        """The log of the run so far."""
        if not self._record.begun:
            self._record.begin(self._flat(), len(self.param_groups))
        return self._record.log

    @property
    def eps(self) -> float:
        """ε; may be set between steps."""
        return float(self._record.settings["eps"])

    @eps.setter
    def eps(self, value: float) -> None:
        self._record.settings["eps"] = finite("MeZO", "eps", value, 0.0, above=True)
        if self._record.begun:
            self.log.change(eps=self.eps)

    @property
    def steps(self) -> int:
        """Steps taken, skipped ones included: the next step's seeds follow from this number."""
        return len(self._record.log)

    @_disable_dynamo  # a compiled training step calls it uncompiled
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; see the class. Returns the mean of the evaluations, a tensor where the closure returns tensors."""
        if closure is None:
            raise RuntimeError(
                "MeZO.step: needs a closure that evaluates the loss, as in opt.step(lambda: loss_fn(model(x), y)); "
                "a trainer that calls backward() and step() by itself has to call step(closure) in its training step. "
                "leanops.integrations has trainers that do"
            )
        for group in self.param_groups:
            self._check_options(group)
        record, log = self._record, self.log
        slots = self._slots()
        moving = list(chain.from_iterable(slots))
        step_seeds = record.step_seeds(self.steps)
        self._reduction.use(moving)
        log_file = self._log_file if self._reduction.writes_log and not log.attached else None
        if log_file is not None:
            log.check_path(log_file, new=not len(log))  # before the evaluations, which may take minutes
        scalars, loss = self._evaluator.estimate(closure, moving, step_seeds, self.eps, self._reduction)
        applied = all(map(math.isfinite, scalars))
        if not applied and self._on_nonfinite == "raise":
            raise FloatingPointError(
                f"MeZO: step {self.steps}: a loss, or the estimate from it in fp32, is not finite "
                f"(estimates {scalars}); nothing was changed"
            )
        record.note_buffers(self._evaluator.changed_buffers)
        if log_file is not None:
            log.attach(log_file, new=not len(log))
        record.note(self.param_groups, slots)
        if applied:
            for group, group_slots in zip(self.param_groups, slots, strict=True):
                update = record.strategy.update(record.window, step_seeds, scalars, group)
                if update is not None:
                    with fixed_kept(group_slots):
                        record.strategy.apply_(group_slots, update, self.state)
            record.window.add(step_seeds, scalars, self.param_groups)
        log.append(scalars if applied else None)
        return loss

    # --- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """torch's state, and under ``"mezo"`` the log as bytes in a tensor: a run resumes from it to the same bits."""
        state = super().state_dict()
        state["mezo"] = {"log": torch.frombuffer(bytearray(self.log.to_bytes()), dtype=torch.uint8), "eps": self.eps}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume a run; seed and eps become the saved run's.

        Raises ValueError, and changes nothing, where the saved run has other parameters, or another variant, number of
        directions, distribution, rounding or momentum mode.
        """
        op = "MeZO.load_state_dict"
        if "mezo" not in state_dict:
            raise ValueError(f"{op}: state_dict must be a MeZO optimizer's, got one with no entry 'mezo'")
        if missing := {"log", "eps"} - state_dict["mezo"].keys():
            raise ValueError(f"{op}: the entry 'mezo' must hold 'log' and 'eps', it lacks {', '.join(sorted(missing))}")
        log = ZoLog.from_bytes(state_dict["mezo"]["log"].cpu().numpy().tobytes(), name=op)
        self._record.check_same_run(op, log, self._flat())
        super().load_state_dict(state_dict)
        self._record.settings |= {"seed": log.header["seed"], "eps": state_dict["mezo"]["eps"]}
        # torch casts state to the parameter's dtype; momenta are wider than half-precision parameters
        saved_ids = chain.from_iterable(g["params"] for g in state_dict["param_groups"])
        for p, saved_id in zip(self._flat(), saved_ids, strict=True):
            for key, value in state_dict["state"].get(saved_id, {}).items():
                self.state[p][key] = value.to(p.device, copy=True)
        self._record.restore(log)

    def __getstate__(self) -> dict[str, Any]:
        if self._reduction.group is not None:
            raise TypeError("MeZO: an optimizer with a process group cannot be copied or pickled; use state_dict()")
        attributes = ("_on_nonfinite", "_evaluator", "_reduction", "_record", "_run_parameters")
        copied = {name: self.__dict__[name] for name in attributes}
        return {**super().__getstate__(), **copied, "_log_file": None}  # a copy does not append to the original's file
