"""Evaluating a function at perturbed weights that exist only where they are used: W itself is never written.

While the closure runs, a mode sees every call of a torch function. It replaces managed parameters among the arguments
by ``round(W + scale z)``, in an arena that is as large as the largest need of one function and that the next function
uses again. Each use makes the same bits, so tied weights are perturbed once. Some parameters are held by a copy
instead: perturbed in place in every evaluation and restored, as :class:`~leanops.optim.zo.perturb_in_place.Copy` does
with all parameters. They are:

- Parameters that no torch function was given, because scripted modules, C++ code or views made earlier use them. The
  first evaluation is repeated with these perturbed in place. They are held if the results differ.
- Parameters with a view that outlives an evaluation, because a module keeps it. The view is pointed at the parameter,
  the parameter is held, and the evaluation is repeated.
- All parameters, if a compiled function uses one in the first evaluation and ``keeps_compiled`` is set.

Limits, which ``Copy`` does not have. Two kinds of weights are not found: those that torch functions and hidden code (or
another thread) both use, and those that hidden code uses only from a later step on. Perturbed weights have no
gradients, and what a function writes into them (an embedding with ``max_norm``) is lost.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor

from leanops.optim.zo.arena import Arena, Outliving, point_at_weights
from leanops.optim.zo.directions import Seed
from leanops.optim.zo.first_step import Trace, same
from leanops.optim.zo.perturb_in_place import Closure, Copy, Repeated
from leanops.optim.zo.perturbing_mode import PerturbingMode
from leanops.optim.zo.slots import Slot
from leanops.optim.zo.strategy import Strategy

Loss = Tensor | float


class Scratch:
    """Weights perturbed at each use, W never written: exact, with scratch as large as the largest use."""

    def __init__(self, slots: Sequence[Slot], strategy: Strategy, op: str, keeps_compiled: bool = False) -> None:
        self._op = op
        self._strategy = strategy
        self._keeps_compiled = keeps_compiled
        self._all = list(slots)
        self._slots = _by_identity(slots)  # perturbed where they are used
        self._seen: dict[int, Slot] = {}  # those of them that a torch function was given
        self._outliving = Outliving()
        self._checked = self._warned_of_compiled = False
        self._stack = ExitStack()
        self.arenas: dict[torch.device, Arena] = {}
        self.held: Copy | None = None  # perturbed in place
        self.repeated: Repeated = None

    @contextmanager
    def session(self) -> Iterator[None]:
        with ExitStack() as stack:
            self._stack = stack
            if self.held is not None:
                stack.enter_context(self.held.session())
            yield

    def evaluate(self, closure: Closure, seed: Seed, scale: float, restore: Callable[[], None]) -> Loss:
        self.repeated = None
        first = not self._checked and scale != 0.0
        trace = self._new_trace() if first else None
        loss = self._run(closure, seed, scale, trace)
        while self._hold_what_outlives() | self._hold_what_is_compiled(trace):
            restore()
            trace = self._new_trace() if first and self._slots else None
            loss = self._run(closure, seed, scale, trace)
        if first and math.isfinite(loss):  # a step with another loss does not count, and shows nothing
            seen = {s.tensor_id for s in self._seen.values()}
            hidden = [s for s in self._not_held() if s.tensor_id not in seen]
            if hidden and trace is not None:
                loss = self._find_hidden(hidden, closure, seed, scale, restore, trace, loss)
            self._checked = True
        return loss

    def _new_trace(self) -> Trace:
        return Trace(set(_by_identity(self._all)), Scratch._run.__code__)

    def _not_held(self) -> list[Slot]:
        return [s for s in self._all if id(s.param) in self._slots]

    def _run(self, closure: Closure, seed: Seed, scale: float, trace: Trace | None = None) -> Loss:
        if self.held is not None:
            self.held.place(seed, scale)
        if not self._slots and trace is None:
            return closure()
        write = self._strategy.prepared(seed, scale) if scale != 0.0 else None
        released = self._outliving.released
        with _eager(), PerturbingMode(self._slots, self.arenas, write, self._seen, released, trace):
            return closure()

    def _hold(self, slots: Sequence[Slot]) -> None:
        """Perturb these slots in place from now on."""
        if self.held is None:
            self.held = Copy([], self._strategy)
            self._stack.enter_context(self.held.session())
        self.held.add(slots)
        for identity in _by_identity(slots):
            del self._slots[identity]

    def _hold_what_outlives(self) -> bool:
        """Hold parameters whose perturbed memory something still refers to. Returns whether there are any."""
        released = self._outliving.take()
        ids = {s.tensor_id for r in released for s in r.slots}
        slots = [s for s in self._not_held() if s.tensor_id in ids]
        if not slots:
            return False
        count = point_at_weights(released)
        self._hold(slots)
        self._warn(
            f"memory of these perturbed parameters is still referred to after the evaluation, as when a module keeps a "
            f"view of its weight: {_names(slots)}. {count} tensors in that memory are now the same views of the "
            "parameter, which is perturbed in place and restored from a copy from now on. A NumPy array or C++ code "
            "that keeps such memory keeps reading this evaluation's weights: pass perturb='copy' if there is one"
        )
        return True

    def _hold_what_is_compiled(self, trace: Trace | None) -> bool:
        """Hold all parameters if that lets compiled functions run compiled. Returns whether it does."""
        if trace is None or not trace.compiled or not self._slots:
            return False
        if trace.compiled_weights and self._keeps_compiled:
            self._hold(self._not_held())
            return True
        if not self._warned_of_compiled:
            self._warned_of_compiled = True
            self._warn(
                "the closure calls a function of torch.compile, which runs eagerly here, because weights are perturbed "
                "where an eager function uses them. Pass perturb='copy' to run it compiled"
            )
        return False

    def _find_hidden(
        self,
        hidden: list[Slot],
        closure: Closure,
        seed: Seed,
        scale: float,
        restore: Callable[[], None],
        trace: Trace,
        loss: Loss,
    ) -> Loss:
        """Evaluate again with ``hidden`` perturbed in place, and hold them if the loss or the trace differs."""

        def evaluate_again() -> tuple[Loss, Trace]:
            restore()
            new_trace = self._new_trace()
            return self._run(closure, seed, scale, new_trace), new_trace

        for identity in _by_identity(hidden):
            del self._slots[identity]
        temporary = Copy(hidden, self._strategy)
        try:
            with temporary.session():
                temporary.place(seed, scale)
                second, second_trace = evaluate_again()
        finally:
            self._slots |= _by_identity(hidden)
        if same(loss, second) and trace.agrees(second_trace):
            self.repeated = loss, second
            return second  # the loss does not depend on these parameters
        self._hold(hidden)
        third, third_trace = evaluate_again()
        self.repeated = second, third
        repeats = same(second, third) and second_trace.agrees(third_trace)
        self._warn(
            f"some of these parameters {'reach' if repeats else 'may reach'} the loss without passing a torch function "
            "(scripted modules, C++ code, views made beforehand), so they are perturbed in place and restored from a "
            f"copy: {_names(hidden)}"
            + ("" if repeats else ". The closure's results differ each time at the same weights, so it cannot be told")
        )
        return third

    def _warn(self, text: str) -> None:
        warnings.warn(f"{self._op}: {text}", stacklevel=2)


def _by_identity(slots: Sequence[Slot]) -> dict[int, Slot]:
    """id(p) -> the slot of a parameter or of one of its twins."""
    return {id(p): s._replace(param=p) for s in slots for p in (s.param, *s.twins)}


def _names(slots: Sequence[Slot]) -> str:
    more = f" and {len(slots) - 8} more" if len(slots) > 8 else ""
    return ", ".join(s.name for s in slots[:8]) + more


def _eager() -> AbstractContextManager[object]:
    """A context in which compiled functions run eagerly, so that the mode sees their torch functions."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance
