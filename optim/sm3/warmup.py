"""The first steps of a parameter, which fill its covers and move nothing: which parameters still take them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from leanops.optim.sm3.options import Group, cover_warmup, device_of_step
from leanops.optim.sm3.state import State, number


def are_warming(group: Group, states: Sequence[State], device: torch.device) -> list[bool]:
    """Of each state of parameters on one device; waits for the device where ``step`` lies there."""
    count = cover_warmup(group)
    if not count or not states:
        return [False] * len(states)
    step_device = device_of_step(group, device)
    steps = torch.stack([number(s.get("step", 0.0)).detach().to(step_device).reshape(()) for s in states])
    if isinstance(steps, FakeTensor):  # it has no values; later steps need the most memory
        return [False] * len(states)
    _can_be_read(steps, count)
    return (steps < count).tolist()


def is_over(group: Group, steps: Tensor, more: int = 0) -> bool:
    """Whether one of the parameters, after so many more steps, is past the warm-up."""
    count = cover_warmup(group)
    if isinstance(steps, FakeTensor):
        return False
    _can_be_read(steps, count)
    return bool((steps + more >= count).any())


def _can_be_read(steps: Tensor, count: int) -> None:
    if steps.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"SM3: a CUDA graph can be captured only after the warm-up of the covers, got a capture with cover_warmup="
            f"{count}; take {count} steps before it"
        )
