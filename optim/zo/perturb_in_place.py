"""Evaluating a function at perturbed weights: in place, with a saved copy or (inexactly) without one.

A perturber opens a session for the evaluations of one step; within it, ``evaluate`` calls the function while the
weights read as ``round(W + scale z(seed))``. :mod:`leanops.optim.zo.perturb_at_use` has the perturber that never
writes the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from torch import Tensor, nn

from leanops.optim.zo.directions import Seed
from leanops.optim.zo.slots import Slot, by_device
from leanops.optim.zo.strategy import Strategy

Closure = Callable[[], Tensor | float]
Repeated = tuple[Tensor | float, Tensor | float] | None


class Perturber(Protocol):
    repeated: Repeated  # results of two evaluations at the same weights, if the last call to evaluate made two

    def session(self) -> AbstractContextManager[None]:
        """The context of the evaluations of one step. At its end the weights are what they were, also after errors."""
        ...

    def evaluate(self, closure: Closure, seed: Seed, scale: float, restore: Callable[[], None]) -> Tensor | float:
        """closure() at W + scale z(seed). ``restore`` restores generators and buffers before a repeated call."""
        ...


class Copy:
    """The weights are perturbed in place and restored from a saved copy: exact, at twice the memory of the weights.

    Everything sees the perturbed weights: compiled graphs, scripted modules, FSDP, C++ code.
    """

    repeated: Repeated = None

    def __init__(self, slots: Sequence[Slot], strategy: Strategy, model: nn.Module | None = None) -> None:
        self._parts = by_device(slots)
        self._strategy = strategy
        self._sharded = fsdp_modules(model)
        self._saved: list[list[Tensor]] = []

    @contextmanager
    def session(self) -> Iterator[None]:
        self._saved = []
        try:
            for part in self._parts:
                self._saved.append([s.local.clone() for s in part])
            yield
        finally:
            try:
                self._restore()
            except BaseException:  # an interrupt has stopped the first attempt
                self._restore()
                raise

    def _restore(self) -> None:
        for part, saved in zip(self._parts, self._saved, strict=False):
            for s, old in zip(part, saved, strict=True):
                s.local.copy_(old)
        self._saved = []
        drop_unsharded(self._sharded)

    def add(self, slots: Sequence[Slot]) -> None:
        """Perturb further slots from now on. Called within a session."""
        for part in by_device(slots):
            saved = [s.local.clone() for s in part]
            self._parts.append(part)
            self._saved.append(saved)

    def place(self, seed: Seed, scale: float) -> None:
        """Set the weights to W + scale z(seed). Called within a session."""
        for part, saved in zip(self._parts, self._saved, strict=True):
            outs = [s.local for s in part]
            sources = [s._replace(local=old) for s, old in zip(part, saved, strict=True)]
            self._strategy.perturb_into_(outs, sources, seed, scale)
        drop_unsharded(self._sharded)

    def evaluate(self, closure: Closure, seed: Seed, scale: float, restore: Callable[[], None]) -> Tensor | float:
        self.place(seed, scale)
        return closure()


class InPlace:
    """W + eps z, then - 2 eps z, then + eps z, in place, no extra memory. **Not exact.**

    Each of the additions rounds. In bf16 one such cycle at weights of 0.02 and eps = 1e-3 leaves 45% of the weights
    changed, by 7.8e-5 RMS, eight times a typical update, and the damage grows as the square root of the number of
    steps; in fp32 the change is about one part in 10^7 a step. A log does not replay to the same bits. Use it only on a
    machine without memory for the scratch of the default mode.
    """

    repeated: Repeated = None

    def __init__(self, slots: Sequence[Slot], strategy: Strategy, model: nn.Module | None = None) -> None:
        self._parts = by_device(slots)
        self._strategy = strategy
        self._sharded = fsdp_modules(model)
        self._seed, self._scale = Seed(0), 0.0

    @contextmanager
    def session(self) -> Iterator[None]:
        self._seed, self._scale = Seed(0), 0.0
        try:
            yield
        finally:
            self._move(self._seed, -self._scale)
            self._scale = 0.0

    def _move(self, seed: Seed, scale: float) -> None:
        if scale:
            for part in self._parts:
                self._strategy.perturb_(part, seed, scale)
        drop_unsharded(self._sharded)

    def evaluate(self, closure: Closure, seed: Seed, scale: float, restore: Callable[[], None]) -> Tensor | float:
        if seed != self._seed and self._scale:
            self._move(self._seed, -self._scale)
            self._scale = 0.0
        self._move(seed, scale - self._scale)
        self._seed, self._scale = seed, scale
        return closure()


def fsdp_modules(model: nn.Module | None) -> list[nn.Module]:
    """Modules that FSDP (fully_shard) manages."""
    return [] if model is None else [m for m in model.modules() if hasattr(m, "reshard") and hasattr(m, "unshard")]


def drop_unsharded(modules: Sequence[nn.Module]) -> None:
    """Drop gathered weights, which FSDP's root keeps after a forward pass: they are stale once the shards change."""
    for module in modules:
        module.reshard()  # type: ignore[operator]
