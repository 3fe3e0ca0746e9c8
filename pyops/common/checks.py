"""Checks of input for every operator. The messages name operator, argument, value seen and value wanted."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

IDS, INDICES = 2**32, 2**63  # upper limits of tensor ids and of element indices
LARGEST_FLOAT32 = torch.finfo(torch.float32).max


def require(condition: bool, message: str, error: type[Exception] = ValueError) -> None:
    if not condition:
        raise error(message)


def one_of(op: str, name: str, value: object, options: Collection[object]) -> None:
    if value not in options:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(str, options))}, got {value}")


def in_range(op: str, name: str, value: int, low: int, high: int) -> None:
    """Require ``low <= value < high``. Symbolic integers pass here and are checked again with their values."""
    if isinstance(value, int) and not low <= value < high:
        raise ValueError(f"{op}: {name} must be in [{low}, {high}), got {value}")


def finite(op: str, name: str, value: Any, low: float = -math.inf, *, above: bool = False) -> float:
    """``value`` as a float. It must be finite and at least ``low``, or greater than ``low`` if ``above``. Text raises
    TypeError: float() would take it, but later arithmetic would fail."""
    bound = f" {'>' if above else '>='} {low:g}" if math.isfinite(low) else ""
    wanted = f"{op}: {name} must be a finite number{bound}, got {value!r}"
    if isinstance(value, (str, bytes, bytearray)):
        raise TypeError(f"{wanted}, which is text; YAML reads 1e-6 as text and 1.0e-6 as a number")
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError comes from a tensor of several elements
        number = math.nan
    if not math.isfinite(number) or number < low or (above and number == low):
        raise ValueError(wanted)
    return number


def is_integer(value: object) -> bool:
    """Whether it is an integer of Python, NumPy or another library, or a symbolic integer. Bools are excluded."""
    return isinstance(value, (Integral, torch.SymInt)) and not isinstance(value, bool)


def integer(op: str, name: str, value: int, high: int) -> int:
    """``value`` as an int; ValueError unless it is in [0, ``high``). The dispatcher's own error omits its name."""
    if not is_integer(value):
        raise ValueError(f"{op}: {name} must be an integer, got {value!r}")
    value = value if isinstance(value, torch.SymInt) else int(value)
    in_range(op, name, value, 0, high)
    return value


def integers(op: str, name: str, values: Iterable[int], high: int) -> list[int]:
    """:func:`integer` of each; 50 us for a thousand."""
    if not isinstance(values, Iterable):
        raise ValueError(f"{op}: {name} must be a sequence of integers, got {values!r}")
    items = as_list(values)
    if {int}.issuperset(map(type, items)) and (not items or 0 <= min(items) <= max(items) < high):
        return items
    return [integer(op, f"{name}[{i}]", v, high) for i, v in enumerate(items)]


def as_list(values: Any) -> list[Any]:
    """A value, an iterable or a NumPy array as a list."""
    if isinstance(values, np.ndarray):
        values = values.tolist()
    return list(values) if isinstance(values, Iterable) else [values]


def same_layout(op: str, name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """Require that ``tensor`` has the shape, dtype and device of ``like``."""
    for what in ("shape", "dtype", "device"):
        seen, wanted = getattr(tensor, what), getattr(like, what)
        if seen != wanted:
            seen, wanted = (list(seen), list(wanted)) if what == "shape" else (seen, wanted)
            raise ValueError(f"{op}: {name} must have the {what} of {like_name}, {wanted}, got {seen}")


def rate_is_one_number(op: str, lr: Any) -> None:
    """Refuse a learning rate that is neither a number nor a one-element tensor."""
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"{op}: Tensor lr must be 1-element, got shape {list(lr.shape)}")
    elif not hasattr(lr, "__float__"):
        raise TypeError(f"{op}: lr must be a number or a one-element tensor, got {lr!r}")
