"""SM3 over several processes: this rank's part of a gradient, and the maximum of the covers that ranks share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from leanops.optim.common import parameters
from leanops.optim.sm3.refusals import is_plain


def local_gradient(p: Any, g: Any) -> Tensor:
    """This process's part of a gradient, as a plain tensor. ValueError for a wrapper without plain values."""
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


def combine_column_covers(group: Any, covers: list[Tensor], stale: list[Tensor]) -> None:
    """The maximum over the processes that share rows, of all parameters' column covers (as int32) in one all-reduce.

    Non-negative floats have the order of their bits, and NaN is above infinity. So NaN survives as an integer, also in
    libraries whose float maximum drops NaN. ``stale`` are the covers of parameters of which this process has no rows:
    they are set to zero first.
    """
    for cover in stale:
        cover.zero_()
    flat = torch.cat(covers).bitwise_and_(0x7FFFFFFF)
    torch.distributed.all_reduce(flat, torch.distributed.ReduceOp.MAX, group=group)
    for cover, new in zip(covers, flat.split([c.numel() for c in covers]), strict=True):
        cover.copy_(new)
