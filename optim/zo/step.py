"""One step of a run, as a log holds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

FIELDS = ("lr", "weight_decay", "momentum")  # of a parameter group; each is 0 until it is set


@dataclass(frozen=True)
class Step:
    """The data that repeats the update of a step."""

    index: int
    scalars: tuple[float, ...] | None  # None: the step was skipped and changed nothing
    groups: tuple[Mapping[str, float], ...]  # of each parameter group, the values of FIELDS
    frozen: frozenset[int]  # ids of parameters that did not move
    restart: bool  # momentum started at 0, because other parameters moved than before
