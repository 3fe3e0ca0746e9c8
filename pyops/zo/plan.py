"""The launches of a call, for the backends in Python: their tensors, and how these are cut into tiles.

All tensors of a dtype make one launch. With low-rank noise there are two: one of the matrices, and one of the vectors,
which have Gaussian noise. A launch reads a table with a row for each tensor: ``Row``, or ``Slot`` in csrc/zo/call.cuh.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from leanops.zo.calls import AxpyInto

Tile = int | tuple[int, int]  # elements, or (rows, columns) of a matrix


class Pair(NamedTuple):
    """The contiguous memory that is read and written for one tensor. In place both are the same."""

    target: Tensor
    source: Tensor
    tensor_id: int
    offset: int
    columns: int = 0  # of low-rank noise
    second: Tensor | None = None  # gets source - c z; ``target`` then gets source + c z


class Row(NamedTuple):
    """A tensor as a kernel reads it: addresses and integers."""

    out: int
    source: int
    offset: int
    numel: int
    first: int  # tiles of the tensors before this one
    tensor_id: int
    columns: int


@contextmanager
def dense(out: Tensor) -> Iterator[Tensor]:
    """A contiguous tensor to write: ``out``, or one that is copied to ``out`` afterwards."""
    target = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    yield target
    if target is not out:
        out.copy_(target)


@contextmanager
def launches(call: AxpyInto) -> Iterator[list[list[Pair]]]:
    """The non-empty tensors as contiguous pairs, a list for each launch. Strided results are copied back afterwards."""
    groups: dict[torch.dtype, tuple[list[Pair], list[Pair]]] = {}
    strided: list[tuple[Tensor, Tensor]] = []
    places = zip(call.noise.tensor_ids, call.noise.offsets, call.noise.widths(), strict=True)
    for o, t, (tensor_id, offset, columns) in zip(call.out, call.tensors, places, strict=True):
        if o.numel() == 0:
            continue
        source, target = t.contiguous(), o
        if not o.is_contiguous():
            target = torch.empty_like(source) if source is t else source
            strided.append((o, target))
        vectors, matrices = groups.setdefault(o.dtype, ([], []))
        (matrices if columns else vectors).append(Pair(target, source, tensor_id, offset, columns))
    yield [pairs for group in groups.values() for pairs in group if pairs]
    for o, target in strided:
        o.copy_(target)


def tiles_of(tile: Tile, offset: int, numel: int, columns: int) -> int:
    """The number of tiles that have elements of a tensor. Tiles are aligned to logical indices, so the first and the
    last may be partial."""
    last = offset + numel - 1
    if isinstance(tile, int):
        return last // tile - offset // tile + 1
    rows, across = tile
    return (last // columns // rows - offset // columns // rows + 1) * -(-columns // across)


def table(pairs: Sequence[Pair], tile: Tile) -> tuple[list[Row], int]:
    """The table of a launch, and the number of its tiles."""
    rows, first = [], 0
    for p in pairs:
        numel = p.target.numel()
        rows.append(Row(p.target.data_ptr(), p.source.data_ptr(), p.offset, numel, first, p.tensor_id, p.columns))
        first += tiles_of(tile, p.offset, numel, p.columns)
    return rows, first
