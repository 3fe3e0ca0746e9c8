"""Zeroth-order operators: seeded noise for MeZO, FedKSeed and methods like them."""

from __future__ import annotations

from leanops.zo import specs as _specs  # registers the operators
from leanops.zo.checks import MAX_RANK
from leanops.zo.ops import columns_of, zo_axpy_, zo_axpy_into_, zo_linear, zo_noise
from leanops.zo.reference import VERSION

__all__ = ["MAX_RANK", "VERSION", "columns_of", "zo_axpy_", "zo_axpy_into_", "zo_linear", "zo_noise"]

del _specs
