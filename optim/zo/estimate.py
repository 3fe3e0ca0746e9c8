"""The estimate of a step: which evaluations it needs, on whom, and what comes of them."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from leanops.optim.common.parameters import check_apart, is_sharded
from leanops.optim.zo.directions import Seed
from leanops.optim.zo.perturb_at_use import Scratch
from leanops.optim.zo.perturb_in_place import Copy, InPlace, Perturber, drop_unsharded, fsdp_modules
from leanops.optim.zo.processes import Reduction
from leanops.optim.zo.slots import Slot
from leanops.optim.zo.strategy import Strategy

MODES = ("auto", "scratch", "copy", "inplace")


class Evaluator:
    """Runs the closure at the perturbed weights that an estimate asks for."""

    def __init__(self, mode: str, strategy: Strategy, model: nn.Module | None, same_rng: bool) -> None:
        if mode not in MODES:
            raise ValueError(f"MeZO: perturb must be one of {', '.join(MODES)}, got {mode!r}")
        self._mode = mode
        self._strategy = strategy
        self._model = model
        self._same_rng = same_rng
        self._perturber: Perturber | None = None
        self._for: tuple[int, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        # a copy of the optimizer is for other parameters; what it evaluates is found out anew
        mode = "copy" if self._mode == "auto" and _opaque(self._model) else self._mode
        return {**self.__dict__, "_perturber": None, "_for": (), "_model": None, "_mode": mode}

    def _ready(self, op: str, slots: Sequence[Slot]) -> Perturber:
        key = tuple(id(t) for s in slots for t in (s.param, *s.twins, *s.state))
        if self._perturber is None or key != self._for:
            check_apart(op, ((s.name, s.local) for s in slots))
            mode = self._choose(slots)
            if mode == "scratch":
                self._perturber = Scratch(slots, self._strategy, op)
            else:
                self._perturber = (Copy if mode == "copy" else InPlace)(slots, self._strategy, self._model)
            self._for = key
        return self._perturber

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
        return "copy" if sharded or _opaque(self._model) else "scratch"

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
        mine = [k for k in range(len(seeds)) if reduce.mine(k)]
        points = self._strategy.points(mine, reduce.first)
        losses, kind = self._losses(op, closure, slots, [(seeds[k], side * eps) for k, side in points])
        measured = self._strategy.measured(dict(zip(points, losses, strict=True)), eps)
        scalars = self._strategy.scalars(reduce(measured))
        finite = all(map(math.isfinite, losses))
        mean = math.fsum(x / len(losses) for x in losses) if finite else sum(losses) / len(losses)
        rounded = torch.tensor(scalars, dtype=torch.float64, device="cpu").float().tolist()
        if kind is None:
            return rounded, mean
        dtype, device = kind
        return rounded, torch.tensor(mean, dtype=torch.promote_types(dtype, torch.float32), device=device)

    def _losses(
        self, op: str, closure: Callable[[], Any], slots: Sequence[Slot], points: Sequence[tuple[Seed, float]]
    ) -> tuple[list[float], tuple[torch.dtype, torch.device] | None]:
        perturber = self._ready(op, slots)
        rng = _Generators(slots) if self._same_rng else None
        found: list[Any] = []
        kind = None

        def evaluation() -> Tensor | float:
            nonlocal kind
            torch.clear_autocast_cache()  # it keeps casts of parameters until the outermost autocast ends
            with torch.no_grad():  # and off again where the closure leaves grad enabled
                loss = closure()
            if isinstance(loss, Tensor):
                kind = loss.dtype, loss.device
            return _scalar(op, loss)

        try:
            with perturber.session():
                for i, (seed, scale) in enumerate(points):
                    if rng is not None and i:
                        rng.restore()
                    found.append(perturber.evaluate(evaluation, seed, scale, rng.restore if rng else _nothing))
        finally:
            torch.clear_autocast_cache()
        drop_unsharded(fsdp_modules(self._model))
        tensors = [v for v in found if isinstance(v, Tensor)]
        on_device = iter(
            torch.stack(tensors).tolist() if tensors else []
        )  # one wait for the device, after all evaluations
        return [next(on_device) if isinstance(v, Tensor) else v for v in found], kind


def _scalar(op: str, loss: Any) -> Tensor | float:
    """A copy of the value: the closure may use the same memory for its next result."""
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


def _nothing() -> None:
    pass


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


class _Generators:
    """The state of torch's generators on the CPU and on the parameters' devices."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = {s.local.device: torch.cuda.get_rng_state(s.local.device) for s in slots if s.local.is_cuda}

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)
