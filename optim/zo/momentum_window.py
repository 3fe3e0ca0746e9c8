"""The past steps that momentum is recomputed from. The run and its replay follow this one rule."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice

from leanops.optim.zo.directions import Seed
from leanops.optim.zo.step import Step


def length(beta: float) -> int:
    """How many steps momentum looks back, the present one included: those with beta^j >= 2^-24."""
    return 1 if beta == 0.0 else 1 + math.floor(math.log(2.0**-24) / math.log(beta))


class MomentumWindow:
    """Seeds and scalars of the applied steps that a later step's momentum needs."""

    def __init__(self) -> None:
        self._steps: deque[tuple[Sequence[Seed], Sequence[float]]] = deque()  # the newest first

    def restart(self) -> None:
        """Forget every step: momentum starts at 0 where the set of moving parameters changes."""
        self._steps.clear()

    def terms(
        self, seeds: Sequence[Seed], scalars: Sequence[float], lr: float, beta: float
    ) -> tuple[list[Seed], list[float]]:
        """Seeds and coefficients of one update, the present step first: its first seed keys stochastic rounding."""
        terms: list[Seed] = []
        coeffs: list[float] = []
        for j, (step_seeds, estimates) in enumerate(islice([(seeds, scalars), *self._steps], length(beta))):
            weight = lr * beta**j / len(estimates)
            terms += step_seeds
            coeffs += [-(weight * g) for g in estimates]
        return terms, coeffs

    def add(self, seeds: Sequence[Seed], scalars: Sequence[float], groups: Sequence[Mapping[str, float]]) -> None:
        """Add an applied step. The parameter group with the largest momentum decides how many steps are kept."""
        self._steps.appendleft((seeds, scalars))
        longest = max(length(float(group["momentum"])) for group in groups)
        while len(self._steps) > longest:
            self._steps.pop()

    def follow(self, steps: Iterable[Step], seeds_of: Callable[[int], list[Seed]]) -> Iterator[tuple[Step, list[Seed]]]:
        """Each step and its seeds; a skipped step has none. While a step is yielded, the window holds the steps before
        it."""
        for step in steps:
            if step.restart:
                self.restart()
            seeds = [] if step.scalars is None else seeds_of(step.index)
            yield step, seeds
            if step.scalars is not None:
                self.add(seeds, step.scalars, step.groups)
