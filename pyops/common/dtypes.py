"""The dtypes that the operators compute in."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # dtypes of weights in every family

# the C++ types of csrc/common/types.h
CXX_NAMES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.bfloat16: "leanops::bf16",
    torch.float16: "leanops::fp16",
}


def wide_dtype(t: Tensor) -> torch.dtype:
    """The dtype to accumulate in: float32, or float64 for float64."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def dtype_names(dtypes: Iterable[torch.dtype]) -> str:
    """``float32, bfloat16 or int8``, for messages."""
    *names, last = map(dtype_name, dtypes)
    return f"{', '.join(names)} or {last}" if names else last
