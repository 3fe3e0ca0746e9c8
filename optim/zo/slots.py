"""What a zeroth-order step moves: a parameter's id, its memory on this rank, and its place in the whole tensor."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from leanops.optim.common import parameters
from leanops.zo import columns_of


class Slot(NamedTuple):
    """A tensor, or this rank's rows of it. ``offset`` is the index of its first element in the whole tensor, and
    ``columns`` counts the elements of a row, 0 for a tensor of fewer than two dimensions. ``state`` are tensors of the
    shape of ``local`` that the run's strategy keeps for the parameter, such as HiZOO's curvature."""

    param: Tensor
    local: Tensor
    tensor_id: int
    offset: int
    name: str
    columns: int
    state: tuple[Tensor, ...] = ()


def slot_of(op: str, name: str, tensor_id: int, p: Tensor) -> Slot:
    return Slot(
        p,
        parameters.local(p),
        tensor_id,
        parameters.place(op, name, p) if parameters.is_sharded(p) else 0,
        name,
        columns_of(p.shape),
    )


def by_device(slots: Iterable[Slot]) -> list[list[Slot]]:
    """The operators take the tensors of one device a call."""
    found: dict[torch.device, list[Slot]] = {}
    for s in slots:
        found.setdefault(s.local.device, []).append(s)
    return list(found.values())
