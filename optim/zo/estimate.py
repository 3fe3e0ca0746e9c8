"""The estimate of a step: runs the evaluations that it needs, and computes its scalars from their losses."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from leanops.common.checks import one_of
from leanops.common.dtypes import dtype_name
from leanops.optim.common.parameters import check_apart, is_sharded
from leanops.optim.zo.closures import explain, look_for_backward
from leanops.optim.zo.directions import Seed
from leanops.optim.zo.forward_state import ForwardState
from leanops.optim.zo.perturb_at_use import Scratch
from leanops.optim.zo.perturb_in_place import Copy, InPlace, Perturber, Repeated, drop_unsharded, fsdp_modules
from leanops.optim.zo.processes import Reduction
from leanops.optim.zo.slots import Slot
from leanops.optim.zo.strategy import Strategy

MODES = ("auto", "scratch", "copy", "inplace")
# auto is copy up to so many elements. By leanops mezo-step --size in fp32 a copy takes 0.53 of the time of scratch at
# 37K elements, 0.97 at 8.3M, 1.09 at 29.6M (docs/results/mezo_step_sizes.md)
SMALL = 1 << 23


class Evaluator:
    """Runs the closure at the perturbed weights that an estimate asks for."""

    def __init__(self, mode: str, strategy: Strategy, model: nn.Module | None, same_rng: bool) -> None:
        one_of("MeZO", "perturb", mode, MODES)
        self._mode = mode
        self._strategy = strategy
        self._model = model
        self._same_rng = same_rng
        self._perturber: Perturber | None = None
        self._state: ForwardState | None = None
        self._prepared_for: tuple[int, ...] = ()  # identities of the tensors of perturber and state
        self._compared = self._warned_of_half = self._looked_for_backward = False

    @property
    def changed_buffers(self) -> list[str]:
        """Names of the buffers that the first evaluation changed."""
        return [] if self._state is None else self._state.changed_buffers

    def __getstate__(self) -> dict[str, Any]:
        # a copy of the optimizer has other parameters, so its first step prepares anew
        mode = "copy" if self._mode == "auto" and _opaque(self._model) else self._mode
        reset = {"_perturber": None, "_state": None, "_prepared_for": (), "_model": None, "_compared": False}
        return {**self.__dict__, **reset, "_mode": mode}

    def _prepare(self, op: str, slots: Sequence[Slot], closure: Callable[[], Any]) -> tuple[Perturber, ForwardState]:
        key = tuple(id(t) for s in slots for t in (s.param, *s.twins, *s.state))
        if self._perturber is None or self._state is None or key != self._prepared_for:
            check_apart(op, ((s.name, s.local) for s in slots))
            mode = self._choose(slots)
            if mode == "scratch":
                self._perturber = Scratch(slots, self._strategy, op, keeps_compiled=self._mode == "auto")
            else:
                self._perturber = (Copy if mode == "copy" else InPlace)(slots, self._strategy, self._model)
            self._state = ForwardState(self._model, closure, slots, self._same_rng)
            self._prepared_for = key
        return self._perturber, self._state

    def _choose(self, slots: Sequence[Slot]) -> str:
        sharded = any(is_sharded(s.param) for s in slots)
        if self._mode == "scratch" and sharded:
            raise ValueError("MeZO: perturb='scratch' cannot be used with sharded parameters; use 'copy' (or 'auto')")
        if sharded and self._model is None and "torch.distributed.fsdp" in sys.modules:
            raise ValueError(
                "MeZO: sharded parameters under FSDP need model=, so that the weights it keeps gathered can be dropped"
            )
        if self._mode != "auto":
            return self._mode
        small = sum(s.local.numel() for s in slots) <= SMALL
        return "copy" if sharded or small or _opaque(self._model) else "scratch"

    def estimate(
        self,
        closure: Callable[[], Any],
        slots: Sequence[Slot],
        seeds: Sequence[Seed],
        eps: float,
        reduce: Reduction,
        op: str = "MeZO.step",
    ) -> tuple[list[float], Any]:
        """The scalars of the step, rounded to fp32 as the log keeps them, and the mean of the losses."""
        own_directions = [k for k in range(len(seeds)) if reduce.evaluates(k)]
        points = self._strategy.points(own_directions, reduce.is_first)
        losses, kind = self._losses(op, closure, slots, [(seeds[k], side * eps) for k, side in points])
        measured = self._strategy.measured(dict(zip(points, losses, strict=True)), eps)
        scalars = self._strategy.scalars(reduce(measured))
        finite = all(map(math.isfinite, losses))
        mean = math.fsum(x / len(losses) for x in losses) if finite else sum(losses) / len(losses)
        rounded: list[float] = torch.tensor(scalars, dtype=torch.float64, device="cpu").float().tolist()
        if not all(map(math.isfinite, rounded)) and self._state is not None:
            self._state.undo()
        self._warn_of_half(op, losses, rounded[: len(seeds)], kind)
        if kind is None:
            return rounded, mean
        dtype, device = kind
        return rounded, torch.tensor(mean, dtype=torch.promote_types(dtype, torch.float32), device=device)

    def _losses(
        self, op: str, closure: Callable[[], Any], slots: Sequence[Slot], points: Sequence[tuple[Seed, float]]
    ) -> tuple[list[float], tuple[torch.dtype, torch.device] | None]:
        perturber, state = self._prepare(op, slots, closure)
        values: list[Tensor | float] = []
        repeated: Repeated = None
        kind = None
        evaluated = 0

        def evaluation() -> Tensor | float:
            nonlocal kind, evaluated
            torch.clear_autocast_cache()  # it keeps casts of parameters until the outermost autocast ends
            try:
                with torch.no_grad():  # for every call: a closure may leave grad enabled
                    loss = closure()
                if isinstance(loss, Tensor):
                    kind = loss.dtype, loss.device
                value = _scalar(op, loss)
            except Exception as error:
                explain(op, error, closure, evaluated)
                raise
            evaluated += 1
            return value

        without_gradient = [] if self._looked_for_backward else [s.param for s in slots if s.param.grad is None]
        state.save()
        try:
            with perturber.session():
                for i, (seed, scale) in enumerate(points):
                    if i:
                        state.restore()
                    values.append(perturber.evaluate(evaluation, seed, scale, state.restore))
                    if not self._looked_for_backward:
                        look_for_backward(op, closure, without_gradient)
                        self._looked_for_backward = True
                    # all processes evaluate equally often: closures may communicate
                    if i == 0 and not self._compared and self._same_rng:
                        repeated = perturber.repeated
                        if repeated is None:
                            state.restore()
                            repeated = values[-1], perturber.evaluate(evaluation, seed, scale, state.restore)
                            values[-1] = repeated[1]
        except BaseException:
            state.undo()
            raise
        finally:
            torch.clear_autocast_cache()
        drop_unsharded(fsdp_modules(self._model))
        # one wait for the device, after all evaluations
        tensors = [v for v in values if isinstance(v, Tensor)]
        numbers = iter(torch.stack(tensors).tolist() if tensors else [])
        losses = [next(numbers) if isinstance(v, Tensor) else v for v in values]
        if repeated is not None:
            self._compared = True
            _warn_of_randomness(op, float(repeated[0]), float(repeated[1]), losses)
        return losses, kind

    def _warn_of_half(
        self, op: str, losses: list[float], scalars: list[float], kind: tuple[torch.dtype, torch.device] | None
    ) -> None:
        """Warn once where a loss in half precision is too coarse to differ between evaluations."""
        if self._warned_of_half or kind is None or kind[0] not in (torch.bfloat16, torch.float16) or all(scalars):
            return
        self._warned_of_half = True
        warnings.warn(
            f"{op}: the closure returns its loss in {dtype_name(kind[0])}, and two evaluations gave "
            f"{losses[0]:.6g} exactly, so their difference is 0 and the step moves nothing. Compute and return the "
            "loss in float32, as in cross_entropy(logits.float(), labels)",
            stacklevel=2,
        )


def _warn_of_randomness(op: str, first: float, second: float, losses: list[float]) -> None:
    """Warn where two evaluations at the same weights differ by more than rounding, and by more than a tenth of what the
    evaluations of the step differ by."""
    difference, signal = abs(first - second), max(losses) - min(losses)
    one_is_finite = math.isfinite(first) != math.isfinite(second)
    if one_is_finite or (difference > 1e-6 * abs(first) and not difference < 0.1 * signal):
        warnings.warn(
            f"{op}: two evaluations of the closure at the same weights gave {first:.9g} and {second:.9g}, while the "
            f"evaluations of this step differ by {signal:.3g}: the estimate is mostly noise. The closure draws another "
            "batch at each call, changes its own inputs (give each call a copy), or draws random numbers from a "
            "generator of its own. The global generators of torch, NumPy and random are restored between evaluations. "
            "Seed every other generator inside the closure",
            stacklevel=2,
        )


def _scalar(op: str, loss: Any) -> Tensor | float:
    """The closure's result as a copy: the closure may use the same memory for its next result."""
    if isinstance(loss, Tensor):
        if loss.numel() != 1 or loss.is_complex():
            raise ValueError(f"{op}: closure must return a real scalar, got {loss.dtype} of shape {list(loss.shape)}")
        if is_sharded(loss):
            loss = loss.full_tensor()  # type: ignore[attr-defined]
        return loss.detach().reshape(()).to(torch.float64, copy=True)
    try:
        return float(loss)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{op}: closure must return a scalar tensor or a number, got {type(loss).__name__}") from error


def _opaque(model: nn.Module | None) -> bool:
    """Whether a model runs code that no TorchFunctionMode sees into."""
    if model is None:
        return False
    return any(
        getattr(m, "_compiled_call_impl", None) is not None
        or type(m).__name__ == "OptimizedModule"
        or isinstance(m, torch.jit.ScriptModule)
        for m in model.modules()
    ) or bool(fsdp_modules(model))
