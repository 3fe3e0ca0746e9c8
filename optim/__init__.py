"""Thin optimizers over the operators."""

from __future__ import annotations

from leanops.optim.backward_flops import BackwardFlops
from leanops.optim.fused_backward import FusedBackward, fuse_into_backward
from leanops.optim.half_fine_tuning import HalfFineTuning
from leanops.optim.lisa import LISA
from leanops.optim.log import LogError, ZoLog
from leanops.optim.mezo import MeZO, decay_groups
from leanops.optim.prefix_knapsack import prefix_knapsack
from leanops.optim.replay import replay_, replay_file
from leanops.optim.reset import reset_momentum_
from leanops.optim.seed_pool import SeedPool
from leanops.optim.sm3 import SM3
from leanops.optim.tensor_selector import TensorSelection, TensorSelector
from leanops.optim.trainer_callback import trainer_callback

__all__ = [
    "LISA",
    "SM3",
    "BackwardFlops",
    "FusedBackward",
    "HalfFineTuning",
    "LogError",
    "MeZO",
    "SeedPool",
    "TensorSelection",
    "TensorSelector",
    "ZoLog",
    "decay_groups",
    "fuse_into_backward",
    "prefix_knapsack",
    "replay_",
    "replay_file",
    "reset_momentum_",
    "trainer_callback",
]
