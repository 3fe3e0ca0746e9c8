"""Thin optimizers over the operators."""

from __future__ import annotations

from leanops.optim.log import LogError, ZoLog
from leanops.optim.mezo import MeZO, decay_groups
from leanops.optim.replay import replay_, replay_file
from leanops.optim.seed_pool import SeedPool

__all__ = ["LogError", "MeZO", "SeedPool", "ZoLog", "decay_groups", "replay_", "replay_file"]
