"""SM3, an adaptive optimizer whose state is a vector for each axis of a weight."""

from __future__ import annotations

from leanops.sm3 import specs as _specs  # registers the operator
from leanops.sm3.calls import MOMENTUM_ON, StepOptions
from leanops.sm3.ops import sm3_cover, sm3_cover_axes, sm3_momentum, sm3_step_
from leanops.sm3.reference import VERSION, scale_shape

__all__ = [
    "MOMENTUM_ON",
    "VERSION",
    "StepOptions",
    "scale_shape",
    "sm3_cover",
    "sm3_cover_axes",
    "sm3_momentum",
    "sm3_step_",
]

del _specs
