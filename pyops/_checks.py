"""Refusing bad input: what every operator needs, with messages that name operator, argument, value and expectation."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

IDS, INDICES = 2**32, 2**63  # how many tensors, and elements of one, an operator can tell apart
_MANY = 16  # tensors from which the vectorized test is the faster one


def require(condition: bool, message: str, error: type[Exception] = ValueError) -> None:
    if not condition:
        raise error(message)


def one_of(op: str, name: str, value: object, options: Collection[object]) -> None:
    if value not in options:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(str, options))}, got {value}")


def in_range(op: str, name: str, value: int, low: int, high: int) -> None:
    """``low <= value < high``. Symbolic integers pass: they are checked again with their values."""
    if isinstance(value, int) and not low <= value < high:
        raise ValueError(f"{op}: {name} must be in [{low}, {high}), got {value}")


def finite(op: str, name: str, value: Any, low: float = -math.inf, *, above: bool = False) -> float:
    """``value`` as a float, where it is a finite number, not below ``low``, or above it."""
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):  # the last from a tensor of several elements
        number = math.nan
    if not math.isfinite(number) or number < low or (above and number == low):
        bound = f" {'>' if above else '>='} {low:g}" if math.isfinite(low) else ""
        raise ValueError(f"{op}: {name} must be a finite number{bound}, got {value!r}")
    return number


def is_integer(value: object) -> bool:
    """Of Python or numpy, or symbolic; True and False are none."""
    return isinstance(value, (int, torch.SymInt, np.integer)) and not isinstance(value, bool)


def integer(op: str, name: str, value: int, high: int) -> int:
    """``value`` as an int, where it is an integer in [0, ``high``). The dispatcher refuses others without a name."""
    if not is_integer(value):
        raise ValueError(f"{op}: {name} must be an integer, got {value!r}")
    value = int(value) if isinstance(value, np.integer) else value
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
    """One or many, of Python or numpy."""
    if isinstance(values, np.ndarray):
        values = values.tolist()
    return list(values) if isinstance(values, Iterable) else [values]


def same_layout(op: str, name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """Shape, dtype and device of ``tensor`` are those of ``like``."""
    for what in ("shape", "dtype", "device"):
        seen, wanted = getattr(tensor, what), getattr(like, what)
        if seen != wanted:
            seen, wanted = (list(seen), list(wanted)) if what == "shape" else (seen, wanted)
            raise ValueError(f"{op}: {name} must have the {what} of {like_name}, {wanted}, got {seen}")


def _span(t: Tensor) -> tuple[int, int]:
    """First byte and one past the last byte that the tensor touches."""
    start = t.data_ptr()
    if t.is_contiguous():
        return start, start + t.nbytes
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return start, start + (last + 1) * t.element_size()


def overlaps_itself(t: Tensor) -> bool:
    """Whether two indices of a tensor name the same memory, as in an expanded tensor."""
    if t.is_contiguous() or t.numel() < 2:
        return False
    dims = sorted((stride, size) for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1)
    reach = 0  # the largest offset that the dimensions so far can make
    for stride, size in dims:
        if stride <= reach:
            offsets = torch.zeros((), dtype=torch.int64, device="cpu")
            for s, n in dims:
                offsets = (offsets[..., None] + s * torch.arange(n, device="cpu")).flatten()
            return offsets.unique().numel() != t.numel()
        reach += (size - 1) * stride
    return False


def _share_memory(a: Tensor, b: Tensor) -> bool:
    """Exact, for two tensors whose spans intersect; interleaved views share a span but no memory."""
    if a.is_contiguous() and b.is_contiguous():
        return True
    low, high = min(_span(a)[0], _span(b)[0]), max(_span(a)[1], _span(b)[1])
    touched = torch.zeros(high - low, dtype=torch.uint8, device="cpu")
    for t in (a, b):
        size = t.element_size()
        view = touched.as_strided(
            (*t.shape, size), (*(s * size for s in t.stride()), 1), storage_offset=t.data_ptr() - low
        )
        view += 1
    return bool((touched > 1).any())


def _clearly_apart(tensors: Sequence[Tensor]) -> bool:
    """Whether all are contiguous and no two share a byte; 0.3 us a tensor where a loop that names them takes 0.7."""
    if not all(map(Tensor.is_contiguous, tensors)):
        return False
    starts = _int64(map(Tensor.data_ptr, tensors))
    sizes = _int64(map(attrgetter("nbytes"), tensors))
    occupied = (starts != 0) & (sizes != 0)  # neither meta nor empty
    starts, sizes = starts[occupied], sizes[occupied]
    order = np.argsort(starts)
    starts, sizes = starts[order], sizes[order]
    return bool((starts[:-1] + sizes[:-1] <= starts[1:]).all())


def _int64(values: Iterable[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.fromiter(values, dtype=np.int64)


class WrittenMemory:
    """Refuses to write to a tensor that requires grad, overlaps itself, or shares memory with another argument."""

    def __init__(self, op: str, names: Sequence[str], written: Collection[int]) -> None:
        self.op, self.names, self.written = op, names, frozenset(written)

    def check(self, values: Sequence[Any]) -> None:
        lists = [v if isinstance(v, (list, tuple)) else (v,) for v in values]
        tensors = [t for items in lists if items and isinstance(items[0], Tensor) for t in items]
        refusable = torch.is_grad_enabled() and any(map(attrgetter("requires_grad"), tensors))
        if len(tensors) < _MANY or refusable or not _clearly_apart(tensors):
            self._check_each(values)

    def _check_each(self, values: Sequence[Any]) -> None:
        grad = torch.is_grad_enabled()
        starts: list[tuple[int, int, bool, int, int]] = []  # first byte, one past the last, written, argument, item
        for place, value in enumerate(values):
            writes = place in self.written
            items = value if isinstance(value, (list, tuple)) else (value,)
            for i, t in enumerate(items):
                if not isinstance(t, Tensor):
                    break
                start = t.data_ptr()
                if t.is_contiguous():
                    end = start + t.nbytes
                elif writes and overlaps_itself(t):
                    text = f"{self._name(values, place, i)} must not overlap itself, got shape {list(t.shape)}"
                    raise ValueError(f"{self.op}: {text} with strides {list(t.stride())}")
                else:
                    end = _span(t)[1]
                if writes and grad and t.requires_grad:
                    text = f"{self._name(values, place, i)} requires grad and would be written in place"
                    raise RuntimeError(f"{self.op}: {text}; use torch.no_grad()")
                if start and end > start:  # neither meta nor empty
                    starts.append((start, end, writes, place, i))
        starts.sort()
        reach = 0
        for n, span in enumerate(starts):
            if span[0] < reach:
                self._compare(values, span, starts[:n])
            reach = max(reach, span[1])

    def _compare(self, values: Sequence[Any], span: tuple[Any, ...], before: Sequence[tuple[Any, ...]]) -> None:
        for other in before:
            if other[1] <= span[0] or not (span[2] or other[2]):
                continue  # apart, or both only read
            if _share_memory(self._tensor(values, *other[3:]), self._tensor(values, *span[3:])):
                names = (self._name(values, *s[3:]) for s in (other, span))
                raise ValueError(f"{self.op}: {' and '.join(names)} must not overlap in memory")

    def _tensor(self, values: Sequence[Any], place: int, i: int) -> Tensor:
        tensor: Tensor = values[place] if isinstance(values[place], Tensor) else values[place][i]
        return tensor

    def _name(self, values: Sequence[Any], place: int, i: int) -> str:
        return self.names[place] if isinstance(values[place], Tensor) else f"{self.names[place]}[{i}]"
