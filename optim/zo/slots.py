"""What a zeroth-order step moves: a parameter's id, its memory on this rank, and its place in the whole tensor."""

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
    """A tensor, or this rank's rows of it. ``offset`` is the index of its first element in the whole tensor, and
    ``columns`` counts the elements of a row, 0 for a tensor of fewer than two dimensions. ``state`` are tensors of the
    shape of ``local`` that the run's strategy keeps for the parameter, such as HiZOO's curvature. ``fixed`` are the
    elements that neither move nor are perturbed: the first index and one past the last, in the whole tensor, of each
    run of rows. ``twins`` are other parameters with the same memory."""

    param: Tensor
    local: Tensor
    tensor_id: int
    offset: int
    name: str
    columns: int
    state: tuple[Tensor, ...] = ()
    fixed: tuple[tuple[int, int], ...] = ()
    twins: tuple[Tensor, ...] = ()


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
    begin, size = slot.offset, slot.local.numel()
    for first, end in slot.fixed[max(bisect_right(slot.fixed, (begin, begin)) - 1, 0) :]:
        low, high = max(first - begin, 0), min(end - begin, size)
        if first >= begin + size:
            return
        if low >= high:
            continue
        if all(t.is_contiguous() for t in tensors):
            yield tuple(t.view(-1)[low:high] for t in tensors)
        else:  # whole rows: only contiguous tensors are cut within a row
            width = size // slot.local.shape[0]
            yield tuple(t[low // width : high // width] for t in tensors)


def keep_fixed_(outs: Sequence[Tensor], slots: Sequence[Slot]) -> None:
    """Give the fixed elements of ``outs`` the values that they have in the slots."""
    for out, slot in zip(outs, slots, strict=True):
        if slot.fixed:
            for new, old in fixed_parts(slot, out, slot.local):
                new.copy_(old)


@contextmanager
def fixed_kept(slots: Sequence[Slot]) -> Iterator[None]:
    """Whatever happens to the slots within, their fixed elements have their bits at the end."""
    saved = [(part, part.clone()) for s in slots if s.fixed for (part,) in fixed_parts(s, s.local)]
    try:
        yield
    finally:
        for part, old in saved:
            part.copy_(old)


def by_device(slots: Iterable[Slot]) -> list[list[Slot]]:
    """The operators take the tensors of one device a call."""
    found: dict[torch.device, list[Slot]] = {}
    for s in slots:
        found.setdefault(s.local.device, []).append(s)
    return list(found.values())
