"""The call of the operator."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Twice(NamedTuple):
    """``twice``: y = 2 x."""

    x: Tensor
