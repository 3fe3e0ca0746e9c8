"""SM3 over several processes: this rank's part of a gradient, and the maximum of the covers that ranks share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from leanops.optim.common import parameters
from leanops.optim.sm3.refusals import is_plain


def local_gradient(p: Any, g: Any) -> Tensor:
    """This process's part of a gradient. A wrapper gives its values up, or raises, before anything is written."""
    if parameters.is_sharded(p):
        if g.placements != p.placements:
            g = g.redistribute(p.device_mesh, p.placements)
        g = g.to_local()
    if is_plain((g,)) or isinstance(g, FakeTensor):
        return g
    values: Tensor = g.wait() if hasattr(g, "wait") else g.clone()
    if not is_plain((values,)):
        raise ValueError(f"SM3: a gradient must be a plain tensor or a DTensor, got {type(g).__name__}")
    return values


def combine_column_covers(group: Any, tails: list[Tensor], blanks: list[Tensor]) -> None:
    """The maximum over the processes that share rows, of all parameters' column covers at once.

    Bits of non-negative numbers are ordered as the numbers, and NaN lies above infinity: as integers they survive
    libraries whose maximum drops a NaN. A process without rows of a parameter holds stale maxima in ``blanks``: they
    are set to zero first.
    """
    for tail in blanks:
        tail.zero_()
    flat = torch.cat(tails).bitwise_and_(0x7FFFFFFF)
    torch.distributed.all_reduce(flat, torch.distributed.ReduceOp.MAX, group=group)
    for tail, new in zip(tails, flat.split([t.numel() for t in tails]), strict=True):
        tail.copy_(new)
