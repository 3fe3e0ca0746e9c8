"""Copies of a batch: every evaluation of a step gets its own, because a trainer may change its batch."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")


def copy_of(batch: T) -> T:
    """A copy that shares no container and no tensor with ``batch``.

    A tensor in a mapping, list or tuple is cloned by itself. ``copy.deepcopy`` alone would copy its whole storage, of
    which a batch may be a small slice.
    """
    clones: dict[int, Any] = {}
    _clone_tensors(batch, clones)
    return copy.deepcopy(batch, clones)


def _clone_tensors(value: Any, clones: dict[int, Any]) -> None:
    if isinstance(value, Tensor):
        clones[id(value)] = value.detach().clone()
    elif isinstance(value, Mapping):
        for item in value.values():
            _clone_tensors(item, clones)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _clone_tensors(item, clones)
