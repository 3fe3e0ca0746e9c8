"""The launches of a call, for the backends in Python: their tensors as matrices, and how these are cut into tiles.

Tensors with the same dtypes make one launch. It reads a table on the device: a row of words for each tensor, then the
sizes of all tensors. csrc/sm3/plan.h does the same in C++.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from leanops.sm3.calls import Step
from leanops.sm3.reference import BLOCK

KINDS = {None: 0, torch.float32: 1, torch.bfloat16: 2, torch.int8: 3}  # of momenta


class Item(NamedTuple):
    """One parameter of a launch, with its gradient and state. All tensors are contiguous."""

    param: Tensor
    grad: Tensor
    cover: Tensor
    momentum: Tensor | None
    scale: Tensor | None
    offset: int
    tensor_id: int
    place: int  # among the parameters of the call


class Matrix(NamedTuple):
    """A shape as a matrix. At rank 0 or 1 it has rows of 256 elements, and the last row may be incomplete."""

    rows: int
    cols: int
    split: int  # number of axes that are rows


class Tiling(NamedTuple):
    """How a backend cuts matrices into tiles."""

    tile_of: Callable[[Matrix, bool], tuple[int, int]]  # rows and columns of a tile; the flag: int8 momenta
    gathers: Callable[[int, int], bool]  # (tiles, rank): whether the tensor needs scratch words for its maxima
    slot_words: int  # words of a tensor's row in the table


class Row(NamedTuple):
    """A tensor as a kernel reads it: addresses and integers. A backend adds fields of its own."""

    param: int
    grad: int
    cover: int
    momentum: int  # 0: none
    scale: int  # 0: none
    maxima: int  # number of its first word of scratch, from 1 on (see `addresses`); 0: none
    rows: int
    cols: int
    numel: int
    offset: int
    first: int  # tiles of the tensors before this one
    tiles: int
    sizes: int  # index of its sizes in the table's words
    tensor_id: int
    rank: int
    split: int


class Table(NamedTuple):
    """A launch's tensors."""

    rows: list[Row]
    sizes: list[int]  # of all tensors, one after another
    tiles: int
    scratch: int  # words of 4 bytes, which must be zero at the launch


@cache
def matrix_of(shape: tuple[int, ...], int8: bool) -> Matrix:
    """The split into rows and columns whose sum is least. An int8 momentum's blocks must lie in rows of the matrix."""
    if len(shape) < 2:
        return Matrix(-(-prod(shape) // BLOCK), BLOCK, 0)
    splits = [Matrix(prod(shape[:k]), prod(shape[k:]), k) for k in range(1, len(shape))]
    fit = [m for m in splits if m.split == 1 or not int8 or m.cols % BLOCK == 0]
    return min(fit, key=lambda m: m.rows + m.cols)


def table(items: Sequence[Item], tiling: Tiling) -> Table:
    """The table of non-empty tensors of equal types."""
    momentum = items[0].momentum
    int8 = momentum is not None and momentum.dtype == torch.int8
    rows: list[Row] = []
    sizes: list[int] = []
    first, scratch, before = 0, 0, len(items) * tiling.slot_words
    for i in items:
        shape = tuple(i.param.shape)
        matrix = matrix_of(shape, int8)
        height, width = tiling.tile_of(matrix, int8)
        tiles = -(-matrix.cols // width) * -(-matrix.rows // height)
        maxima = 0
        if len(shape) > 1 and tiling.gathers(tiles, len(shape)):
            maxima = scratch + 1
            scratch += 1 + sum(shape)
        rows.append(
            Row(
                param=i.param.data_ptr(),
                grad=i.grad.data_ptr(),
                cover=i.cover.data_ptr(),
                momentum=0 if i.momentum is None else i.momentum.data_ptr(),
                scale=i.scale.data_ptr() if int8 and i.scale is not None else 0,
                maxima=maxima,
                rows=matrix.rows,
                cols=matrix.cols,
                numel=i.param.numel(),
                offset=i.offset,
                first=first,
                tiles=tiles,
                sizes=before + len(sizes),
                tensor_id=i.tensor_id,
                rank=len(shape),
                split=matrix.split,
            )
        )
        sizes += shape
        first += tiles
    return Table(rows, sizes, first, scratch)


def addresses(maxima: np.ndarray[Any, Any], scratch: int) -> np.ndarray[Any, Any]:
    """The addresses of the tensors' first words of scratch, from their numbers and the address of the scratch."""
    return np.where(maxima != 0, scratch + 4 * (maxima - 1), maxima)


@contextmanager
def launches(call: Step) -> Iterator[list[list[Item]]]:
    """The non-empty tensors, contiguous, a list for each pair of dtypes. Strided parameters are copied back last."""
    groups: dict[tuple[torch.dtype, torch.dtype | None], list[Item]] = {}
    strided: list[tuple[Tensor, Tensor]] = []
    for k, (p, g) in enumerate(zip(call.params, call.grads, strict=True)):
        if p.numel() == 0:
            continue
        m, scale = call.momenta[k] if call.momenta else None, call.scales[k] if call.scales else None
        dense = p.contiguous()
        if dense is not p:
            strided.append((p, dense))
        item = Item(dense, g.contiguous(), call.covers[k], m, scale, call.offsets[k], call.tensor_ids[k], k)
        groups.setdefault((p.dtype, None if m is None else m.dtype), []).append(item)
    yield list(groups.values())
    for p, dense in strided:
        p.copy_(dense)
