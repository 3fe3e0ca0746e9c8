"""Optimizers over the operators, and what decides which parameters train."""

from __future__ import annotations

from leanops.optim.fused_backward import FusedBackward, fuse_into_backward
from leanops.optim.reset import reset_momentum_
from leanops.optim.selection.backward_flops import BackwardFlops
from leanops.optim.selection.half_fine_tuning import HalfFineTuning
from leanops.optim.selection.lisa import LISA
from leanops.optim.selection.prefix_knapsack import prefix_knapsack
from leanops.optim.selection.tensor_selector import TensorSelection, TensorSelector
from leanops.optim.selection.trainer_callback import trainer_callback
from leanops.optim.sm3 import SM3
from leanops.optim.zo.decay_groups import decay_groups
from leanops.optim.zo.log import LogError, ZoLog
from leanops.optim.zo.mezo import MeZO
from leanops.optim.zo.replay import replay_
from leanops.optim.zo.replay_file import replay_file
from leanops.optim.zo.seed_pool import SeedPool

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
