"""The check of the memory that an operator writes: it must not overlap, and no written tensor may require grad."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

_MANY = 16  # with this many tensors or more, the vectorized test is faster


def byte_range(t: Tensor) -> tuple[int, int]:
    """The tensor's first byte, and one past its last byte."""
    start = t.data_ptr()
    if t.is_contiguous():
        return start, start + t.nbytes
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return start, start + (last + 1) * t.element_size()


def overlaps_itself(t: Tensor) -> bool:
    """Whether two indices of a tensor have the same memory, as in an expanded tensor."""
    if t.is_contiguous() or t.numel() < 2:
        return False
    dims = sorted((stride, size) for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1)
    reach = 0  # the largest offset within the dimensions so far
    for stride, size in dims:
        if stride <= reach:
            offsets = torch.zeros((), dtype=torch.int64, device="cpu")
            for s, n in dims:
                offsets = (offsets[..., None] + s * torch.arange(n, device="cpu")).flatten()
            return offsets.unique().numel() != t.numel()
        reach += (size - 1) * stride
    return False


def _share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors with intersecting spans share a byte. Exact: interleaved views share a span but no byte."""
    if a.is_contiguous() and b.is_contiguous():
        return True
    low, high = min(byte_range(a)[0], byte_range(b)[0]), max(byte_range(a)[1], byte_range(b)[1])
    touched = torch.zeros(high - low, dtype=torch.uint8, device="cpu")
    for t in (a, b):
        size = t.element_size()
        view = touched.as_strided(
            (*t.shape, size), (*(s * size for s in t.stride()), 1), storage_offset=t.data_ptr() - low
        )
        view += 1
    return bool((touched > 1).any())


def _clearly_apart(tensors: Sequence[Tensor]) -> bool:
    """Whether all are contiguous and no two share a byte. 0.3 us a tensor; the loop with names takes 0.7 us."""
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
                    end = byte_range(t)[1]
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
                continue  # disjoint spans, or both only read
            if _share_memory(self._tensor(values, *other[3:]), self._tensor(values, *span[3:])):
                names = (self._name(values, *s[3:]) for s in (other, span))
                raise ValueError(f"{self.op}: {' and '.join(names)} must not overlap in memory")

    def _tensor(self, values: Sequence[Any], place: int, i: int) -> Tensor:
        tensor: Tensor = values[place] if isinstance(values[place], Tensor) else values[place][i]
        return tensor

    def _name(self, values: Sequence[Any], place: int, i: int) -> str:
        return self.names[place] if isinstance(values[place], Tensor) else f"{self.names[place]}[{i}]"
