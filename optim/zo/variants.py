"""The strategies by the name of their variant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from leanops.optim.zo.hizoo import Hizoo
from leanops.optim.zo.strategy import Fzoo, OneSided, Sign, Spsa, Strategy

VARIANTS: dict[str, type[Strategy]] = {s.variant: s for s in (Spsa, OneSided, Sign, Fzoo, Hizoo)}


def strategy_of(settings: Mapping[str, Any]) -> Strategy:
    """The strategy of a run's settings, or of its log's header; KeyError for an unknown variant."""
    return VARIANTS[settings["variant"]].of(settings)


def scalars_per_direction(header: Mapping[str, Any]) -> int:
    """How many scalars a log holds for each direction of a step."""
    return VARIANTS.get(header.get("variant", ""), Spsa).scalars_per_direction
