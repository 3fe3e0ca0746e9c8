r"""A run's strategy: everything that depends on its variant and its distribution. The optimizer, its evaluations, its
log and its replay ask this object. :class:`Strategy` moves along z; :class:`leanops.optim.zo.hizoo.Hizoo` scales z.

========== ============================================================== =====================
variant    estimate g_k along direction k                                 evaluations
========== ============================================================== =====================
spsa       (L(theta + eps z_k) - L(theta - eps z_k)) / (2 eps)            2n
sign       sign of the difference                                         2n
one_sided  (L(theta + eps z_k) - L(theta)) / eps                          n + 1
fzoo       (L(theta + eps z_k) - L(theta)) / sigma, sigma the (biased)    n + 1
           standard deviation of the n losses L(theta + eps z_k)
========== ============================================================== =====================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from leanops import _registry
from leanops.common.seeds import seed_tensor
from leanops.optim.zo.directions import Noise, Seed
from leanops.optim.zo.momentum_window import MomentumWindow
from leanops.optim.zo.slots import Slot, fixed_kept, keep_fixed_
from leanops.optim.zo.update import State, Update, accumulate_, apply_, descend_, momentum_of
from leanops.zo import zo_axpy_, zo_axpy_into_

Point = tuple[int, int]  # a direction, and the sign of eps there; (0, 0) is theta itself
THETA: Point = (0, 0)
Write = Callable[[Sequence[Tensor], Sequence[Slot]], None]  # (outs, slots): fills each out from its slot

_AXPY_INTO = _registry.spec("zo_axpy_into_")
_NO_DECAY = torch.zeros(1, dtype=torch.float64, device="cpu")


@dataclass(frozen=True)
class Strategy:
    """How a run estimates and how it moves. Each variant is a subclass."""

    variant: ClassVar[str]
    scalars_per_direction: ClassVar[int] = 1
    not_fused_because: ClassVar[str] = ""  # why no single pass replays the run

    noise: Noise
    directions: int = 1
    rounding: str = "nearest"
    momentum_mode: str = "recompute"

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Strategy:
        """The strategy of a log's header."""
        keys = ("directions", "rounding", "momentum_mode")
        return cls(Noise.of(settings), **{key: settings[key] for key in keys})

    # --- settings -----------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """ValueError for settings that do not fit together."""

    def check_momentum(self, beta: float) -> None:
        """ValueError for a momentum that the run cannot have."""

    @property
    def settings(self) -> dict[str, Any]:
        """The header's entries."""
        return {
            "variant": self.variant,
            "directions": self.directions,
            **self.noise.settings,
            "rounding": self.rounding,
            "momentum_mode": self.momentum_mode,
        }

    @property
    def own_settings(self) -> dict[str, Any]:
        """The header's entries that this variant alone has."""
        return {}

    def seeds(self, base: int, step: int) -> list[Seed]:
        """The directions of one step."""
        return self.noise.seeds(base, step, self.directions)

    # --- the estimate -------------------------------------------------------------------------------------------------

    def points(self, directions: Sequence[int], is_first: bool) -> list[Point]:
        """Where this process evaluates: ``directions`` are its own; ``is_first`` is True in one of the processes that
        share the directions."""
        raise NotImplementedError

    def measured(self, losses: Mapping[Point, float], eps: float) -> list[float]:
        """This process's numbers of the step. Processes that share the directions add them, others average them."""
        raise NotImplementedError

    def scalars(self, measured: list[float]) -> list[float]:
        """The scalars of the step, from what all processes have measured."""
        return measured

    def _by_direction(self, losses: Mapping[Point, float], value: Callable[[int], float]) -> Iterator[float]:
        """A value of every direction, 0 for those that another process evaluates."""
        return (value(k) if (k, 1) in losses else 0.0 for k in range(self.directions))

    # --- weights ------------------------------------------------------------------------------------------------------

    def with_state(self, slot: Slot, state: State) -> Slot:
        """The slot, with the tensors that the strategy keeps for the parameter."""
        return slot

    def perturb_(self, slots: Sequence[Slot], seed: Seed, scale: float) -> None:
        """p <- round(p + scale z), for the slots of one device."""
        with fixed_kept(slots):
            zo_axpy_([s.local for s in slots], seed.left, scale, **self.noise.arguments(slots, [seed]))

    def perturb_into_(self, outs: Sequence[Tensor], slots: Sequence[Slot], seed: Seed, scale: float) -> None:
        """out <- round(p + scale z), for the slots of one device."""
        kept = [s.local for s in slots]
        zo_axpy_into_(outs, kept, seed.left, scale, **self.noise.arguments(slots, [seed]))
        keep_fixed_(outs, slots)

    def prepared(self, seed: Seed, scale: float) -> Write:
        """:meth:`perturb_into_` as a function with little overhead, for many calls. It does not check its tensors."""
        key, right = (seed_tensor(s, "MeZO", "seed") for s in seed)
        scales, noise = torch.tensor([scale], dtype=torch.float64, device="cpu"), self.noise

        def perturb(outs: Sequence[Tensor], slots: Sequence[Slot]) -> None:
            low_rank = (right, [s.columns for s in slots], noise.rank) if noise.distribution == "lowrank" else ()
            _AXPY_INTO.launch(
                outs[0].device,
                outs,
                [s.local for s in slots],
                key,
                scales,
                _NO_DECAY,
                [s.tensor_id for s in slots],
                [s.offset for s in slots],
                noise.distribution,
                "nearest",
                False,
                *low_rank,
            )
            keep_fixed_(outs, slots)

        return perturb

    @property
    def has_state(self) -> bool:
        """Whether a replay rebuilds state of the parameters, so that no other code may drop it during a run."""
        return self.momentum_mode == "store"

    # --- the update, in the run and in its replay ---------------------------------------------------------------------

    def stores_momentum(self, beta: float) -> bool:
        return self.momentum_mode == "store" and beta != 0.0

    def update(
        self, window: MomentumWindow, seeds: Sequence[Seed], scalars: Sequence[float], group: Mapping[str, Any]
    ) -> Update | None:
        """A step's update of a group's parameters; None where no bit changes."""
        lr, beta = float(group["lr"]), float(group["momentum"])
        stored = self.stores_momentum(beta)
        if not lr and not stored:
            return None  # a step of zero length changes no bit, the sign of a zero included
        terms = None if stored else window.terms(seeds, scalars, lr, beta)
        return Update(seeds, scalars, terms, lr, beta, lr * float(group["weight_decay"]))

    def apply_(self, slots: Sequence[Slot], update: Update, state: State) -> None:
        """Move the weights of a group."""
        if update.terms is not None:
            apply_(slots, *update.terms, update.decay, self.noise, self.rounding)
            return
        momenta = [momentum_of(s, state) for s in slots]
        accumulate_(slots, momenta, update.seeds, update.scalars, update.beta, self.noise)
        if update.lr:
            descend_(slots, momenta, update.lr, update.decay, self.rounding, update.seeds[0].left)


class Spsa(Strategy):
    """Two evaluations a direction, on both sides of theta."""

    variant = "spsa"

    def points(self, directions: Sequence[int], is_first: bool) -> list[Point]:
        return [(k, side) for k in directions for side in (1, -1)]

    def measured(self, losses: Mapping[Point, float], eps: float) -> list[float]:
        def slope(k: int) -> float:
            return (losses[k, 1] - losses[k, -1]) / (2.0 * eps)

        return list(self._by_direction(losses, slope))


class Sign(Spsa):
    """The sign of SPSA's estimate."""

    variant = "sign"

    def scalars(self, measured: list[float]) -> list[float]:
        return [g if math.isnan(g) else float((g > 0) - (g < 0)) for g in measured]


class OneSided(Strategy):
    """One evaluation a direction, and one at theta in every process."""

    variant = "one_sided"

    def points(self, directions: Sequence[int], is_first: bool) -> list[Point]:
        return [*((k, 1) for k in directions), THETA]

    def measured(self, losses: Mapping[Point, float], eps: float) -> list[float]:
        return list(self._by_direction(losses, lambda k: (losses[k, 1] - losses[THETA]) / eps))


class Fzoo(OneSided):
    """One evaluation a direction, and one at theta in the first process; differences in units of their deviation."""

    variant = "fzoo"

    def check(self) -> None:
        if self.directions < 2:
            raise ValueError("MeZO: fzoo needs at least 2 directions, because it divides by their losses' deviation")

    def points(self, directions: Sequence[int], is_first: bool) -> list[Point]:
        return [*((k, 1) for k in directions), *([THETA] if is_first else [])]

    def measured(self, losses: Mapping[Point, float], eps: float) -> list[float]:
        return [*self._by_direction(losses, lambda k: losses[k, 1]), losses.get(THETA, 0.0)]

    def scalars(self, measured: list[float]) -> list[float]:
        *losses, base = measured
        mean = sum(losses) / len(losses)
        sigma = math.sqrt(sum((x - mean) * (x - mean) for x in losses) / len(losses))
        if math.isinf(sigma):
            return [math.nan] * len(losses)
        if sigma == 0.0:
            return [0.0] * len(losses)  # all directions have the same loss: the step has no slope
        return [(x - base) / sigma for x in losses]
