"""One step of a run, as a log tells it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

FIELDS = ("lr", "weight_decay", "momentum")  # of a parameter group; each is 0 until it is set


@dataclass(frozen=True)
class Step:
    """What is needed to repeat the update of a step."""

    index: int
    scalars: tuple[float, ...] | None  # None: skipped, nothing was changed
    groups: tuple[Mapping[str, float], ...]  # of each parameter group, the values of FIELDS
    frozen: frozenset[int]  # ids of parameters that did not move
    restart: bool  # momentum started anew, for what moves has changed
