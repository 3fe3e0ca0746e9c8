"""Draws of what trains: each follows from a seed and the number of the round."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from leanops.common import seeds, streams
from leanops.common.checks import is_integer
from leanops.optim.selection.freezing import Freezer


def at_least(op: str, name: str, value: Any, low: int) -> int:
    """``value`` as an int, where it is an integer of at least ``low``."""
    if not is_integer(value) or value < low:
        raise ValueError(f"{op}: {name} must be an integer >= {low}, got {value!r}")
    return int(value)


def smallest(base: int, round_: int, candidates: Iterable[int], n: int) -> list[int]:
    """n of the candidates, uniformly without replacement: smallest ``derive(base, round, i)`` first."""
    ranked = sorted(candidates, key=lambda i: (seeds.derive(base, round_, i, stream=streams.DRAW_SEEDS), i))
    return sorted(ranked[:n])


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
        self._steps = steps = at_least(f"{self._op}.seek", "steps", steps, 0)
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
