"""How a call becomes launches on a device, for the backends in Python: which tensors, and how they are cut into tiles.

Tensors of one dtype make one launch; low-rank noise makes one of the matrices and one of the vectors, which have
Gaussian noise. A launch reads a table with a row for each tensor, in csrc/zo/call.cuh too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from leanops.zo.calls import AxpyInto

Tile = int | tuple[int, int]  # so many elements, or so many rows and columns of a matrix


class Pair(NamedTuple):
    """One tensor's contiguous memory to read and to write; the same memory where it is updated in place."""

    target: Tensor
    source: Tensor
    tensor_id: int
    offset: int
    columns: int = 0  # of low-rank noise
    second: Tensor | None = None  # the target of source - c z where ``target`` gets source + c z


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
    """A contiguous tensor to write; copied to ``out`` afterwards where that is another."""
    target = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    yield target
    if target is not out:
        out.copy_(target)


@contextmanager
def launches(call: AxpyInto) -> Iterator[list[list[Pair]]]:
    """The non-empty tensors as contiguous pairs, a list for each launch; strided results are copied back afterwards."""
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
    """In how many tiles a tensor has a part. Tiles are aligned to logical indices, so the first and the last may be
    partial."""
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
