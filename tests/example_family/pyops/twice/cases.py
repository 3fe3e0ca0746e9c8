"""Inputs for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch

from leanops._registry import BadInput, Case, Draw, Inputs


def _make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
    return (torch.randn(33, 5, generator=generator).to(device, dtype),)


def _fuzz(draw: Draw, dtype: torch.dtype) -> tuple[Any, ...]:
    return (draw.tensor([draw.integer(0, 40) for _ in range(draw.integer(0, 3))], dtype),)


INPUTS = Inputs(
    cases=(Case("33x5", _make),),
    fuzz=_fuzz,
    bad_inputs=(BadInput("integers", lambda d: (torch.ones(3, device=d).int(),), "twice: x must be float32, .*int32"),),
)
