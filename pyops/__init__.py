"""leanops: operators and drop-in optimizers for training with less memory."""

from __future__ import annotations

import importlib
from types import ModuleType

from leanops import _native, _registry
from leanops.sm3 import sm3_cover, sm3_cover_axes, sm3_momentum, sm3_step_
from leanops.zo import zo_axpy_, zo_axpy_into_, zo_linear, zo_noise

__version__ = _native.version()

__all__ = [
    "__version__",
    "sm3_cover",
    "sm3_cover_axes",
    "sm3_momentum",
    "sm3_step_",
    "zo_axpy_",
    "zo_axpy_into_",
    "zo_linear",
    "zo_noise",
]

_registry.import_families()
_native.load()


def __getattr__(name: str) -> ModuleType:
    """``leanops.optim`` is imported at its first use."""
    if name == "optim":
        return importlib.import_module("leanops.optim")
    raise AttributeError(f"module 'leanops' has no attribute {name!r}")
