"""Writing values of a wider dtype into the weights."""

from __future__ import annotations

import torch
from torch import Tensor

from leanops.common.rounding import round_to
from leanops.optim.zo.slots import Slot

_CHUNK = 1 << 18


def write_(slot: Slot, value: Tensor, rounding: str, seed: int) -> None:
    """p <- round(value)."""
    p = slot.local
    if rounding == "nearest" or p.dtype in (torch.float32, torch.float64):
        p.copy_(value)
        return
    flat = value.reshape(-1)
    rounded = torch.empty_like(flat, dtype=p.dtype)
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK]
        index = torch.arange(slot.offset + start, slot.offset + start + part.numel(), device=flat.device)
        rounded[start : start + _CHUNK] = round_to(part, p.dtype, rounding, index, seed, slot.tensor_id)
    p.copy_(rounded.view(p.shape))
