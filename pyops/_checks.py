"""Refusing bad input: what every operator needs, with messages that name operator, argument, value and expectation."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


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
        return start, start + t.numel() * t.element_size()
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
            offsets = torch.zeros((), dtype=torch.int64)
            for s, n in dims:
                offsets = (offsets[..., None] + s * torch.arange(n)).flatten()
            return offsets.unique().numel() != t.numel()
        reach += (size - 1) * stride
    return False


def _share_memory(a: Tensor, b: Tensor) -> bool:
    """Exact, for two tensors whose spans intersect; interleaved views share a span but no memory."""
    if a.is_contiguous() and b.is_contiguous():
        return True
    low, high = min(_span(a)[0], _span(b)[0]), max(_span(a)[1], _span(b)[1])
    touched = torch.zeros(high - low, dtype=torch.uint8)
    for t in (a, b):
        size = t.element_size()
        view = touched.as_strided(
            (*t.shape, size), (*(s * size for s in t.stride()), 1), storage_offset=t.data_ptr() - low
        )
        view += 1
    return bool((touched > 1).any())


def _tensors(arguments: Sequence[Any], values: Sequence[Any]) -> Iterator[tuple[str, Tensor, bool]]:
    for argument, value in zip(arguments, values, strict=False):
        writes = argument.alias_info is not None and argument.alias_info.is_write
        if isinstance(value, Tensor):
            yield argument.name, value, writes
        elif isinstance(value, (list, tuple)):
            for i, item in enumerate(value):
                if isinstance(item, Tensor):
                    yield f"{argument.name}[{i}]", item, writes


def written_memory(op: torch._ops.OpOverload, values: Sequence[Any]) -> None:
    """Refuse to write to a tensor that requires grad, overlaps itself, or shares memory with another argument."""
    name = op._schema.name.split("::")[1]
    grad = torch.is_grad_enabled()
    spans = []
    for argument, t, writes in _tensors(op._schema.arguments, values):
        if writes:
            if grad and t.requires_grad:
                raise RuntimeError(
                    f"{name}: {argument} requires grad and would be written in place; use torch.no_grad()"
                )
            if overlaps_itself(t):
                layout = f"shape {list(t.shape)} with strides {list(t.stride())}"
                raise ValueError(f"{name}: {argument} must not overlap itself, got {layout}")
        if t.device.type != "meta" and t.numel():
            spans.append((*_span(t), writes, argument, t))
    spans.sort(key=lambda span: span[0])
    open_spans: list[Any] = []  # spans that reach past the start of the present one
    for span in spans:
        if open_spans:
            open_spans = [s for s in open_spans if s[1] > span[0]]
            for other in open_spans:
                if (span[2] or other[2]) and _share_memory(span[4], other[4]):
                    raise ValueError(f"{name}: {other[3]} and {span[3]} must not overlap in memory")
        open_spans.append(span)
