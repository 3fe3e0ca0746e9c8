"""The distribution of a run's noise z, and the seeds of its steps.

A direction of a step has a seed of its own. Where z = U Vᵀ (``lowrank``), that is U's; V's, the right seed, follows
from step // period and is the same for every direction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from leanops.common import seeds as seed_rule
from leanops.common import streams
from leanops.optim.zo.slots import Slot


class Seed(NamedTuple):
    """The seeds of one direction."""

    left: int
    right: int = 0  # of low-rank noise


class Noise(NamedTuple):
    """A distribution of z, with the rank and the period of the low-rank one."""

    distribution: str
    rank: int = 0
    period: int = 0

    @classmethod
    def of(cls, header: Mapping[str, Any]) -> Noise:
        """The noise that a log's header names."""
        return cls(header["distribution"], header.get("rank", 0), header.get("period", 0))

    @property
    def settings(self) -> dict[str, Any]:
        """The header's entries."""
        low_rank = {"rank": self.rank, "period": self.period} if self.distribution == "lowrank" else {}
        return {"distribution": self.distribution, **low_rank}

    def seeds(self, base: int, step: int, directions: int) -> list[Seed]:
        """The directions of one step."""
        right = seed_rule.derive(base, step // self.period, stream=streams.RIGHT_SEEDS) if self.period else 0
        return [Seed(seed_rule.derive(base, step, k), right) for k in range(directions)]

    def arguments(self, slots: Sequence[Slot], seeds: Sequence[Seed]) -> dict[str, Any]:
        """The arguments of ``zo_axpy_`` and ``zo_axpy_into_`` that describe z, except for the (left) seeds."""
        arguments: dict[str, Any] = {
            "tensor_ids": [s.tensor_id for s in slots],
            "offsets": [s.offset for s in slots],
            "distribution": self.distribution,
        }
        if self.distribution == "lowrank":
            columns = [s.columns for s in slots]
            arguments |= {"right_seeds": [s.right for s in seeds], "columns": columns, "rank": self.rank}
        return arguments


def left_seeds(seeds: Sequence[Seed]) -> list[int]:
    return [s.left for s in seeds]
