"""Draws of the parameters that train: each draw follows from a seed and the number of the round."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

from leanops.common import seeds, streams
from leanops.common.checks import is_integer
from leanops.optim.selection.freezing import Freezer


def at_least(op: str, name: str, value: Any, low: int) -> int:
    """``value`` as an int; ValueError if it is no integer or below ``low``."""
    if not is_integer(value) or value < low:
        raise ValueError(f"{op}: {name} must be an integer >= {low}, got {value!r}")
    return int(value)


def smallest(base: int, round_: int, candidates: Iterable[int], n: int) -> list[int]:
    """Draw n candidates uniformly without replacement: those with the smallest ``derive(base, round, i)``."""
    ranked = sorted(candidates, key=lambda i: (seeds.derive(base, round_, i, stream=streams.DRAW_SEEDS), i))
    return sorted(ranked[:n])


class Rounds:
    """The base of LISA and HalfFineTuning: draws the trainable parameters at the start of every ``period`` steps.

    A draw follows from the seed and the round's number alone. So a run that is resumed, or moved with :meth:`seek`,
    continues as if it had never stopped.
    """

    _blocks: Collection[str]  # names of the blocks
    _always: set[str]  # names of the parameters that train in every round
    _SETTINGS: tuple[str, ...] = ()  # settings that must equal the saved run's to resume

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
        """Names of the parameters that train in a round."""
        raise NotImplementedError

    @property
    def blocks(self) -> list[str]:
        """Names of the blocks."""
        return list(self._blocks)

    @property
    def always(self) -> list[str]:
        """Names of the parameters that train in every round."""
        return sorted(self._always)

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
        """Count a step; call it after ``optimizer.step()``. The end of a round draws anew and frees frozen state.

        Raises RuntimeError after :meth:`attach`, because every step would then count twice.
        """
        if self._attached:
            raise RuntimeError(f"{self._op}.step: attach() counts the steps already; use either attach() or step()")
        self._advance()

    @property
    def _attached(self) -> bool:
        """Whether the hook counts steps. The user may have removed it by its handle."""
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
        """Go to the position after ``steps`` steps. The next step frees the state of the parameters frozen there."""
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
        """Position and settings as plain numbers and strings. The optimizer's own state_dict holds its state."""
        return {"steps": self._steps, "round": self._round, **self._settings()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume: the saved round's parameters train. Call it before or after the optimizer's ``load_state_dict``.

        Raises ValueError, and changes nothing, if the saved run has other settings.
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
