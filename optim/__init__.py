"""Thin optimizers over the operators."""

from __future__ import annotations

from leanops.optim.log import LogError, ZoLog
from leanops.optim.mezo import MeZO, decay_groups
from leanops.optim.replay import replay_, replay_file

__all__ = ["LogError", "MeZO", "ZoLog", "decay_groups", "replay_", "replay_file"]
