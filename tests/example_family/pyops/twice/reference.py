"""The specification."""

from __future__ import annotations

from torch import Tensor


def twice(x: Tensor) -> Tensor:
    """y = 2 x."""
    return x * 2
