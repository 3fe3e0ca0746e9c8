"""The specification."""

from __future__ import annotations

from torch import Tensor

from leanops.twice.calls import Twice


def twice(call: Twice) -> Tensor:
    """y = 2 x."""
    return call.x * 2
