"""A parameter as the zeroth-order operators take it: its id, its memory on this rank, and its offset in the whole."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from leanops.optim.common import parameters
from leanops.zo import columns_of


class Slot(NamedTuple):
    """A tensor, or this rank's rows of it."""

    param: Tensor
    local: Tensor  # this rank's rows
    tensor_id: int
    offset: int  # index of the first element of `local` in the whole tensor
    name: str
    columns: int  # elements of a row; 0 for a tensor of fewer than two dimensions
    state: tuple[Tensor, ...] = ()  # of the shape of `local`: kept by the strategy, such as HiZOO's curvature
    fixed: tuple[tuple[int, int], ...] = ()  # [first, end) in the whole tensor: elements that never change
    twins: tuple[Tensor, ...] = ()  # other parameters with the same memory


def slot_of(op: str, name: str, tensor_id: int, p: Tensor, fixed_rows: Iterable[Sequence[int]] = ()) -> Slot:
    width = p.numel() // max(p.shape[0], 1) if p.dim() else 1
    return Slot(
        p,
        parameters.local(p),
        tensor_id,
        parameters.rows_of(op, name, p).offset if parameters.is_sharded(p) else 0,
        name,
        columns_of(p.shape),
        fixed=tuple((first * width, end * width) for first, end in fixed_rows),
    )


def fixed_parts(slot: Slot, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The fixed elements of a slot, as views of tensors that have the shape of its ``local``."""
    start, size = slot.offset, slot.local.numel()
    nearest = max(bisect_right(slot.fixed, (start, start)) - 1, 0)  # the last run that begins before the slot
    for first, end in slot.fixed[nearest:]:
        low, high = max(first - start, 0), min(end - start, size)
        if first >= start + size:
            return
        if low >= high:
            continue
        if all(t.is_contiguous() for t in tensors):
            yield tuple(t.view(-1)[low:high] for t in tensors)
        else:  # whole rows: only contiguous tensors are cut within a row
            width = size // slot.local.shape[0]
            yield tuple(t[low // width : high // width] for t in tensors)


def keep_fixed_(outs: Sequence[Tensor], slots: Sequence[Slot]) -> None:
    """Copy the slots' fixed elements into ``outs``."""
    for out, slot in zip(outs, slots, strict=True):
        if slot.fixed:
            for new, old in fixed_parts(slot, out, slot.local):
                new.copy_(old)


@contextmanager
def fixed_kept(slots: Sequence[Slot]) -> Iterator[None]:
    """At the end of the context, the slots' fixed elements have the bits that they had at its start."""
    saved = [(part, part.clone()) for s in slots if s.fixed for (part,) in fixed_parts(s, s.local)]
    try:
        yield
    finally:
        for part, old in saved:
            part.copy_(old)


def by_device(slots: Iterable[Slot]) -> list[list[Slot]]:
    """The slots of each device: an operator call takes tensors of one device."""
    by_device: dict[torch.device, list[Slot]] = {}
    for s in slots:
        by_device.setdefault(s.local.device, []).append(s)
    return list(by_device.values())
