"""The parameters, and the rows of a parameter, that a run leaves as they are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from leanops.common.checks import is_integer
from leanops.optim.common.parameters import without_wrappers

Rows = list[list[int]]  # [first, one past the last] of each run of rows, in order


class Exclusions:
    """The user's ``exclude=``: names, regular expressions (searched for in names) and parameters, each with its rows or
    with None for the whole parameter."""

    def __init__(self, exclude: Any) -> None:
        if isinstance(exclude, Mapping):
            self._items = list(exclude.items())
        else:
            is_single = isinstance(exclude, (str, re.Pattern, Tensor))
            if not is_single and exclude is not None and not isinstance(exclude, Iterable):
                raise TypeError(f"MeZO: exclude must hold names, patterns or parameters, got {exclude!r}")
            self._items = [(key, None) for key in ([exclude] if is_single else exclude or ())]
        for key, _ in self._items:
            if not isinstance(key, (str, re.Pattern, Tensor)):
                raise TypeError(f"MeZO: exclude must hold names, patterns or parameters, got {type(key).__name__}")
        self._used = [False] * len(self._items)

    def rows_of(self, name: str, p: Tensor) -> tuple[bool, Rows]:
        """Whether a parameter is excluded as a whole; if not, its excluded rows."""
        chosen: set[int] = set()
        whole = False
        for i, (key, rows) in enumerate(self._items):
            if _matches(key, name, p):
                self._used[i] = True
                whole |= rows is None
                chosen.update(() if rows is None else _indices(name, p, rows))
        return whole, [] if whole else _runs(sorted(chosen))

    def check_used(self) -> None:
        """ValueError for an item that matched no parameter: the parameter of a misspelt name would move."""
        for (key, _), used in zip(self._items, self._used, strict=True):
            if not used:
                shown = f"a tensor of shape {list(key.shape)}" if isinstance(key, Tensor) else repr(key)
                raise ValueError(f"MeZO: exclude must name parameters of the optimizer, got {shown}")


def _matches(key: Any, name: str, p: Tensor) -> bool:
    if isinstance(key, Tensor):
        return key is p
    return key.search(name) is not None if isinstance(key, re.Pattern) else without_wrappers(key) == name


def _indices(name: str, p: Tensor, rows: Any) -> list[int]:
    """The user's rows as indices of at least 0."""
    count = p.shape[0] if p.dim() else 0
    if isinstance(rows, slice):
        return list(range(*rows.indices(count)))
    if isinstance(rows, Tensor):
        rows = (rows.nonzero().flatten() if rows.dtype == torch.bool and len(rows) == count else rows).tolist()
    indices = list(rows) if isinstance(rows, Iterable) else [rows]
    for row in indices:
        if not is_integer(row) or not -count <= row < count:
            raise ValueError(f"MeZO: exclude must have rows of {name} in [{-count}, {count}), got {row!r}")
    return [int(row) % count for row in indices]


def _runs(indices: list[int]) -> Rows:
    runs: Rows = []
    for i in indices:
        if runs and runs[-1][1] == i:
            runs[-1][1] = i + 1
        else:
            runs.append([i, i + 1])
    return runs
