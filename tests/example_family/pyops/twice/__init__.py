"""The smallest family in full: y = 2 x, with a kernel of each kind. A test adds it to a copy of the repository."""

from __future__ import annotations

from leanops.twice import specs as _specs  # registers the operator
from leanops.twice.ops import twice

__all__ = ["twice"]

del _specs
