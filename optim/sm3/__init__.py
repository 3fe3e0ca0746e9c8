"""SM3, a drop-in torch optimizer over the operator ``sm3_step_``."""

from __future__ import annotations

from leanops.optim.sm3.optimizer import SM3

__all__ = ["SM3"]
