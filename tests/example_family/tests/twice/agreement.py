"""Checks that every backend of twice must pass."""

from __future__ import annotations

from typing import Any

import torch
from opsuite import assert_same_bits

from leanops.twice.calls import Twice


def twice(backend: Any, device: str, n: int) -> None:
    x = torch.randn(n, generator=torch.Generator().manual_seed(0)).to(device)
    assert_same_bits([backend.twice(Twice(x))], [x.cpu() * 2])


def every_kernel(backend: Any, device: str) -> None:
    """Small calls that launch every CUDA kernel of the family."""
    twice(backend, device, 1000)
